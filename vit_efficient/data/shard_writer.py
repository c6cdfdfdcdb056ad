"""Writes webdataset shards; index and checksums are made on the way.

All is a function of the samples alone: same samples, same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vit_efficient.data.files import partial_path, sync_folder
from vit_efficient.data.manifest import ShardEntry
from vit_efficient.data.shards import INDEX_DTYPE, Scan, write_index

_END = bytes(2 * tarfile.BLOCKSIZE)  # of a tar


@dataclass(frozen=True)
class ShardSize:
    """Where one shard ends and the next begins: whichever limit comes first."""

    samples: int | None = None
    bytes: int | None = None

    def reached(self, samples: int, size: int) -> bool:
        """Whether a shard of this much is full."""
        return (self.samples is not None and samples >= self.samples) or (self.bytes is not None and size >= self.bytes)


@dataclass(frozen=True)
class Encoded:
    """A sample on its way into a shard; `extension` without the dot, `key` without dots."""

    key: str
    image: bytes
    extension: str
    label: int

    @property
    def size(self) -> int:
        """Bytes of its span: two headers, the label's block, the image."""
        return 3 * tarfile.BLOCKSIZE + _padded(len(self.image))

    def span(self) -> bytes:
        """Its members as they lie in the tar: the same bytes for the same sample, whenever and by whomever written."""
        return _member(f"{self.key}.cls", b"%d" % self.label) + _member(f"{self.key}.{self.extension}", self.image)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii")
    return header + data + bytes(_padded(len(data)) - len(data))


class ShardWriter:
    """One shard; under its own name only when it is whole and on the disk, and its index beside it before that.

    Args:
        path: to be; what was there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = partial_path(path)
        self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by `close` or `abandon`
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, int]] = []
        self.bytes = 0

    @property
    def samples(self) -> int:
        """Written so far."""
        return len(self._rows)

    def add(self, sample: Encoded) -> None:
        """Append a sample."""
        span = sample.span()
        self._rows.append((self.bytes, len(span), zlib.crc32(span), sample.label))
        self._write(span)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)

    def close(self) -> Scan:
        """Finish the shard."""
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        entry = ShardEntry(file=self.path.name, samples=self.samples, bytes=self.bytes, sha256=self._digest.hexdigest())
        scan = Scan(entry, np.array(self._rows, INDEX_DTYPE))
        write_index(self.path, scan)
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)
        return scan

    def abandon(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, and the disk may be full
            self._file.close()
        self._partial.unlink(missing_ok=True)


def write_shards(
    samples: Iterable[Encoded], folder: Path, prefix: str, size: ShardSize, first: int = 0
) -> Iterator[Scan]:
    """Write `prefix-000000.tar` and on, each with its index; yields each shard when it is whole on the disk.

    At that moment `samples` has been asked for the first sample of the next shard, and for no more.

    Args:
        samples: in the order of the shards.
        folder: where to.
        prefix: of the files' names.
        size: of a shard.
        first: number to count from.
    """
    feed = iter(samples)
    pending = next(feed, None)
    number = first
    while pending is not None:
        writer = ShardWriter(folder / f"{prefix}-{number:06d}.tar")
        try:
            while pending is not None and not (writer.samples and size.reached(writer.samples, writer.bytes)):
                writer.add(pending)
                pending = next(feed, None)
            scan = writer.close()
        except BaseException:
            writer.abandon()
            raise
        yield scan
        number += 1
