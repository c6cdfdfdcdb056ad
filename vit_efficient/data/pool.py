"""Images of a source, read and checked by several processes, in order and with bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from vit_efficient.data.counter import permute_index
from vit_efficient.data.encode import Recode, checked
from vit_efficient.data.processes import worker_pool
from vit_efficient.data.sources.base import BadImage, Split

_CHUNK = 8  # images a task: about a megabyte of ImageNet, 40 of a telephone's photographs
_AHEAD = 3  # tasks in hand for each process


@dataclass(frozen=True)
class Made:
    """One image of the source, fit for a shard, or the reason why it is not.

    Args:
        index: in the split.
        name: in the split.
        label: of the image.
        data: encoded; empty where there is a reason.
        extension: of `data`.
        reason: why it is left out.
    """

    index: int
    name: str
    label: int
    data: bytes
    extension: str
    reason: str | None = None


@dataclass(frozen=True)
class Work:
    """What every process must know.

    Args:
        split: images by number.
        key: of the permutation that orders them.
        recode: what becomes of large ones.
    """

    split: Split
    key: int
    recode: Recode

    def make(self, start: int, stop: int) -> Iterator[Made]:
        """The images at these places of the order, each when it is asked for."""
        total = self.split.labels.size
        block = np.arange(start, stop)
        order = permute_index(block, np.full(block.size, total), np.full(block.size, self.key, np.uint64))
        return map(self._one, order.tolist())

    def _one(self, index: int) -> Made:
        name, label = self.split.name(index), int(self.split.labels[index])
        try:
            return Made(index, name, label, *checked(self.split.read(index).data, self.recode))
        except BadImage as error:
            return Made(index, name, label, b"", "", str(error))


def make_all(work: Work, start: int, processes: int, patience: float = 0.0) -> Iterator[Made]:
    """All images from one place of the order on, in order, whoever made them.

    Args:
        work: what to make.
        start: place to begin at.
        processes: that share it; 1: this one alone.
        patience: seconds that this one works alone, and might still need, before others are started: that takes time
            too, and a small set is done by then.

    Raises:
        DataError: a process was killed.
    """
    total, began, low = work.split.labels.size, time.monotonic(), start
    while low < total:
        spent = time.monotonic() - began
        if processes > 1 and spent >= patience and spent * (total - low) >= patience * (low - start):
            yield from _shared(work, low, processes)
            return
        high = min(low + _CHUNK, total)
        yield from work.make(low, high)
        low = high


def _shared(work: Work, start: int, processes: int) -> Iterator[Made]:
    total = work.split.labels.size
    waiting: deque[Future[list[Made]]] = deque()
    remedy = "Start the same command again, with fewer --processes; it goes on from the last whole shard."
    with worker_pool(processes, remedy, _start, work) as pool:
        for low in range(start, total, _CHUNK):
            waiting.append(pool.submit(_make, low, min(low + _CHUNK, total)))
            if len(waiting) >= _AHEAD * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


_work: Work | None = None  # of this worker process


def _start(work: Work) -> None:
    global _work
    _work = work


def _make(start: int, stop: int) -> list[Made]:
    assert _work is not None, "the pool starts every process with its work"
    return list(_work.make(start, stop))
