"""Loaders over a stream: worker processes, waiting time, errors, and where training stands."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.data import DataLoader

from vit_efficient.data.stream import Batch, Failure, SampleStream
from vit_efficient.data.workers import init_worker, signals_held
from vit_efficient.errors import DataError

_T = TypeVar("_T")

log = logging.getLogger(__name__)

_LISTED = 10  # samples that a message names


@dataclass
class Cursor:
    """The optimizer step to come: number `step` of epoch `epoch`. What was consumed, not what was prefetched."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Workers:
    """How a loader runs: processes (0: none, in the caller's), and whether batches are pinned for a GPU."""

    number: int = 0
    pin_memory: bool = False


class _Loader:
    """What both loaders share; counts skipped samples and seconds spent waiting for batches.

    Args:
        most_skipped: samples that may be left out of one epoch.
    """

    def __init__(self, most_skipped: int) -> None:
        self.most_skipped = most_skipped
        self.wait_seconds = 0.0
        self.skipped = 0
        self._left_out: list[str] = []  # of this epoch
        self._loader: DataLoader[Batch | Failure] | None = None
        self._source: Iterator[Batch | Failure] | None = None

    def close(self) -> None:
        """End the worker processes; the next iteration starts new ones."""
        # nobody else holds the iterator, so its finaliser runs here, and ends the workers
        self._source = self._loader = None

    def _next(self) -> Batch:
        assert self._source is not None, "the loader was closed while it was iterated over"
        began = time.perf_counter()
        item = next(self._source)
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, Failure):
            self.close()
            raise DataError(item.message)
        for text in item.pop("skipped"):
            self.skipped += 1
            self._left_out.append(text)
            log.warning("left out: %s", text)
        if len(self._left_out) > self.most_skipped:
            self.close()
            listed = "\n    ".join(self._left_out[:_LISTED])
            raise DataError(
                f"{len(self._left_out)} samples of one epoch had to be left out, more than data.max_skipped allows "
                f"({self.most_skipped} on each device). The first:\n    {listed}\n"
                "Mend or copy these shards again, or allow more."
            )
        return item


class TrainLoader(_Loader):
    """One epoch, or what is left of it, at each iteration; where it begins is the cursor's to say.

    The worker processes live on from epoch to epoch, as long as the cursor goes where they went: they read ahead into
    the next epoch while the last one is evaluated.

    Args:
        open_stream: makes the endless stream that begins at the global step `start`.
        cursor: read at the start of every iteration.
        steps_per_epoch: optimizer steps.
        accumulate: micro-batches a step.
        workers: processes and pinning.
        most_skipped: samples that may be left out of one epoch.
    """

    def __init__(
        self,
        open_stream: Callable[..., SampleStream],
        cursor: Cursor,
        steps_per_epoch: int,
        accumulate: int,
        workers: Workers,
        most_skipped: int = 0,
    ) -> None:
        super().__init__(most_skipped)
        self.open_stream, self.cursor, self.workers = open_stream, cursor, workers
        self.steps_per_epoch, self.accumulate = steps_per_epoch, accumulate
        self._given = 0  # micro-batches of the whole run up to where `_source` stands

    def __len__(self) -> int:
        """Micro-batches of a full epoch."""
        return self.steps_per_epoch * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        self._left_out = []
        step = self.cursor.epoch * self.steps_per_epoch + self.cursor.step
        if self._source is None or self._given != step * self.accumulate:
            self.close()
            self._source = _iterate(_torch_loader(self.open_stream(start=step), self.workers, persistent=False))
            self._given = step * self.accumulate
        for _ in range((self.steps_per_epoch - self.cursor.step) * self.accumulate):
            batch = self._next()
            self._given += 1
            yield batch


class EvalLoader(_Loader):
    """Every sample exactly once over all ranks, equally many batches on each.

    Args:
        stream: with a `stop`.
        batches: how many this rank gets.
        workers: processes and pinning.
        most_skipped: samples that may be left out of one evaluation.
    """

    def __init__(self, stream: SampleStream, batches: int, workers: Workers, most_skipped: int = 0) -> None:
        super().__init__(most_skipped)
        self._stream, self._batches = stream, batches
        self._workers = Workers(min(workers.number, batches), workers.pin_memory)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        if self._loader is None:
            self._loader = _torch_loader(self._stream, self._workers, persistent=True)
        self._source = _iterate(self._loader)
        self._left_out = []
        for _ in range(self._batches):
            yield self._next()


def _torch_loader(stream: SampleStream, workers: Workers, *, persistent: bool) -> DataLoader[Batch | Failure]:
    return DataLoader(
        stream,
        batch_size=None,  # the stream makes the batches
        num_workers=workers.number,
        collate_fn=_as_is,
        pin_memory=workers.pin_memory,
        worker_init_fn=init_worker,
        multiprocessing_context="fork" if workers.number else None,  # what `init_worker` counts on
        persistent_workers=persistent and workers.number > 0,
        generator=torch.Generator(),  # or each new iterator would draw from the global one
    )


def _iterate(loader: DataLoader[Batch | Failure]) -> Iterator[Batch | Failure]:
    with signals_held():  # workers are forked here
        return iter(loader)


def _as_is(item: _T) -> _T:
    return item
