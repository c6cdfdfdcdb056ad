"""Reads any sample of a shard set, by its place."""

from __future__ import annotations

import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.remote.folder import RemoteFolder
from vit_efficient.data.samples import BadSample, Sample, parse_sample
from vit_efficient.data.shard_set import OpenShard, ShardSet
from vit_efficient.errors import DataError


class ShardReader:
    """Random access over a shard set; keeps the files used last open.

    Reads by position, so a fork may share the files with its parent; a pickled copy opens its own.

    Args:
        shards: what to read.
        num_classes: labels at or past it are an error.
        open_files: how many shards stay open; at least as many as are read side by side.
    """

    def __init__(self, shards: ShardSet, num_classes: int, open_files: int = 64) -> None:
        self.shards, self.num_classes, self.open_files = shards, num_classes, open_files
        self._open: OrderedDict[int, tuple[OpenShard, NDArray[np.void]]] = OrderedDict()

    def read(self, shard: int, index: int) -> Sample:
        """One sample.

        Args:
            shard: number in the manifest.
            index: sample within the shard.

        Raises:
            BadSample: its bytes are altered or past the shard's end, or it lacks an image or a label.
            DataError: the shard is absent, or the label is out of range.
        """
        opened, offsets = self._file(shard)
        row = offsets[index]
        return self._sample(opened.name, index, row, opened.read(*_place(row)))

    def read_all(self, shards: Sequence[int], indices: Sequence[int]) -> Iterator[Callable[[], Sample]]:
        """Many samples; what is far away is fetched side by side, as many at a time as the connections allow.

        Args:
            shards: numbers in the manifest.
            indices: samples within them.

        Yields:
            for each sample, in order, what `read` would do: call it for the sample, or its error.
        """
        with ExitStack() as stack:
            pool: ThreadPoolExecutor | None = None
            waiting: deque[Callable[[], Sample]] = deque()
            failed: dict[int, DataError] = {}  # each shard is tried once a batch, with all the patience that takes
            for shard, index in zip(shards, indices, strict=True):
                try:
                    if shard in failed:
                        raise failed[shard]
                    opened, offsets = self._file(shard)
                except DataError as error:
                    failed[shard] = error
                    waiting.append(partial(_raise, error))
                    continue
                if not opened.distant:
                    waiting.append(partial(self.read, shard, index))
                else:
                    if pool is None:
                        pool = ThreadPoolExecutor(self._connections())
                        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
                    row = offsets[index]
                    span = pool.submit(opened.read, *_place(row))
                    waiting.append(partial(self._fetched, opened.name, index, row, span))
            yield from waiting

    def _fetched(self, name: str, index: int, row: np.void, span: Future[bytes]) -> Sample:
        return self._sample(name, index, row, span.result())

    def _connections(self) -> int:
        folder = self.shards.folder
        assert isinstance(folder, RemoteFolder), "only those are far away"
        return folder.config.connections

    def _sample(self, name: str, index: int, row: np.void, span: bytes) -> Sample:
        """Check the span of sample `index` of the shard that is called so, and take it apart."""
        length = int(row["length"])
        if len(span) != length:
            raise BadSample(
                f"{name} is truncated: sample number {index} should end at byte {int(row['offset']) + length:,}. "
                "Copy or prepare this shard again."
            )
        if zlib.crc32(span) != row["crc32"]:
            raise BadSample(
                f"{name}, sample {_key_of(span)} (number {index}): the bytes are not those that were "
                "prepared (checksum differs). Copy or prepare this shard again."
            )
        sample = parse_sample(span, name)
        if not 0 <= sample.label < self.num_classes:
            raise DataError(
                f"{name}, sample {sample.key}: label {sample.label} is out of range; there are "
                f"{self.num_classes} classes, 0 to {self.num_classes - 1}."
            )
        return sample

    def _file(self, shard: int) -> tuple[OpenShard, NDArray[np.void]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        self._open[shard] = self.shards.open(shard)
        if len(self._open) > self.open_files:
            _, (oldest, _) = self._open.popitem(last=False)
            oldest.close()
        return self._open[shard]

    def close(self) -> None:
        """Close all files; reading again opens them again."""
        for opened, _ in self._open.values():
            opened.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _place(row: np.void) -> tuple[int, int]:
    """Offset and length."""
    return int(row["offset"]), int(row["length"])


def _raise(error: DataError) -> Sample:
    raise error


def _key_of(span: bytes) -> str:
    """The key in a span whose bytes cannot be trusted; for messages only."""
    name = span[:100].split(b"\0", 1)[0].decode("ascii", "replace")
    return name.rsplit("/", 1)[-1].split(".", 1)[0] or "with an unreadable name"
