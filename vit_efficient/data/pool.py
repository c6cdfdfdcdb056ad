"""Images of a source, read and checked by several processes, in order and with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from vit_efficient.data.counter import permute_index
from vit_efficient.data.encode import Recode, checked
from vit_efficient.data.processes import worker_pool
from vit_efficient.data.sources.base import BadImage, Split
from vit_efficient.errors import DataError

_CHUNK = 32  # images a task: some megabytes at most
_AHEAD = 3  # tasks in hand for each process
SMALL = 2_000  # images that a single process has done before others have started


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


def make_all(work: Work, start: int, processes: int) -> Iterator[Made]:
    """All images from one place of the order on, in order, whoever made them.

    Args:
        work: what to make.
        start: place to begin at.
        processes: that share it; 1: this one alone.

    Raises:
        DataError: a process was killed.
    """
    total = work.split.labels.size
    chunks = ((low, min(low + _CHUNK, total)) for low in range(start, total, _CHUNK))
    if processes == 1 or total - start <= SMALL:
        for low, high in chunks:
            yield from work.make(low, high)
        return
    pool = worker_pool(processes, _start, work)
    waiting: deque[Future[list[Made]]] = deque()
    try:
        for low, high in chunks:
            waiting.append(pool.submit(_make, low, high))
            if len(waiting) >= _AHEAD * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "One of the processes that read images was killed, perhaps for want of memory. "
            "Start the same command again, with fewer --processes; it goes on from the last whole shard."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Work | None = None  # of this worker process


def _start(work: Work) -> None:
    global _work
    _work = work


def _make(start: int, stop: int) -> list[Made]:
    assert _work is not None, "the pool starts every process with its work"
    return list(_work.make(start, stop))
