"""Reads any sample of a shard set, by its place."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.files import read_span
from vit_efficient.data.resolve import ShardSet
from vit_efficient.data.samples import BadSample, Sample, parse_sample
from vit_efficient.data.shards import read_index
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
        self._open: OrderedDict[int, tuple[int, NDArray[np.void]]] = OrderedDict()

    def read(self, shard: int, index: int) -> Sample:
        """One sample.

        Args:
            shard: number in the manifest.
            index: sample within the shard.

        Raises:
            BadSample: its bytes are altered, or it lacks an image or a label.
            DataError: the shard is absent or truncated, or the label is out of range.
        """
        descriptor, offsets = self._file(shard)
        path = self.shards.path(shard)
        row = offsets[index]
        length = int(row["length"])
        try:
            span = read_span(descriptor, int(row["offset"]), length)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error
        if len(span) != length:
            raise DataError(
                f"{path} is truncated: sample number {index} should end at byte "
                f"{int(row['offset']) + length:,}. Copy or prepare this shard again."
            )
        if zlib.crc32(span) != row["crc32"]:
            raise BadSample(
                f"{path}, sample {_key_of(span)} (number {index}): the bytes are not those that were "
                "prepared (checksum differs). Copy or prepare this shard again."
            )
        sample = parse_sample(span, str(path))
        if not 0 <= sample.label < self.num_classes:
            raise DataError(
                f"{path}, sample {sample.key}: label {sample.label} is out of range; there are "
                f"{self.num_classes} classes, 0 to {self.num_classes - 1}."
            )
        return sample

    def _file(self, shard: int) -> tuple[int, NDArray[np.void]]:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        path = self.shards.path(shard)
        entry = self.shards.manifest.shards[shard]
        offsets = read_index(path, entry.samples)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"The shard {path} cannot be opened: {error.strerror}.") from error
        size = os.fstat(descriptor).st_size
        if size != entry.bytes:
            os.close(descriptor)
            raise DataError(
                f"{path} is {'truncated' if size < entry.bytes else 'not the one prepared'}: {size:,} "
                f"bytes, {entry.bytes:,} in the manifest. Copy or prepare this shard again."
            )
        self._open[shard] = (descriptor, offsets)
        if len(self._open) > self.open_files:
            _, (oldest, _) = self._open.popitem(last=False)
            os.close(oldest)
        return descriptor, offsets

    def close(self) -> None:
        """Close all files; reading again opens them again."""
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _key_of(span: bytes) -> str:
    """The key in a span whose bytes cannot be trusted; for messages only."""
    name = span[:100].split(b"\0", 1)[0].decode("ascii", "replace")
    return name.rsplit("/", 1)[-1].split(".", 1)[0] or "with an unreadable name"
