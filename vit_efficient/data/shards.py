"""Webdataset shards, whoever wrote them, and the offset index beside each.

A shard is a plain tar; `NAME.idx.npy` lists the byte span and the checksum of every sample, so that a reader can go to
any of them.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.files import atomic_writer
from vit_efficient.data.manifest import ShardEntry
from vit_efficient.data.samples import IMAGE_EXTENSIONS, BadSample, key_and_extension, parse_label
from vit_efficient.errors import DataError

# offset and length in bytes of one sample's span (its tar headers included), that span's CRC-32, and the label
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u8"), ("crc32", "<u4"), ("label", "<u4")])

_BLOCK = 1 << 20
_UNREADABLE = (OSError, ValueError, EOFError, SyntaxError, TypeError, tokenize.TokenError)  # numpy's, of a damaged file


def index_path(shard: Path) -> Path:
    """Where the index of a shard lies."""
    return shard.with_name(f"{shard.stem}.idx.npy")


def read_index(shard: Path, samples: int, size: int | None = None) -> NDArray[np.void]:
    """Map the offset index of a shard into memory; an array of `INDEX_DTYPE`.

    Args:
        shard: its file.
        samples: that it holds.
        size: in bytes; None: not known.

    Raises:
        DataError: it is absent, damaged, not of `samples` entries, or points outside the shard.
    """
    path = index_path(shard)
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except _UNREADABLE as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise DataError(f"The offset index {path} {reason}. {_again(str(shard))}") from error
    return _checked_index(index, samples, size, str(path), str(shard))


def parse_index(data: bytes, samples: int, size: int, where: str, shard: str) -> NDArray[np.void]:
    """The same of an index whose bytes came from elsewhere.

    Args:
        data: of the file.
        samples: of the shard.
        size: of the shard, in bytes.
        where: the file, for messages.
        shard: likewise.
    """
    try:
        index = np.load(io.BytesIO(data), allow_pickle=False)
    except _UNREADABLE as error:
        raise DataError(f"The offset index {where} cannot be read: {error}. {_again(shard)}") from error
    return _checked_index(index, samples, size, where, shard)


def _checked_index(index: NDArray[np.void], samples: int, size: int | None, where: str, shard: str) -> NDArray[np.void]:
    """The index, if it is one of so many samples and bytes."""
    if index.dtype != INDEX_DTYPE or index.shape != (samples,):
        raise DataError(
            f"The offset index {where} does not belong to its shard: {index.shape[0] if index.ndim else 0} "
            f"entries, {samples} samples. {_again(shard)}"
        )
    if size is not None and not bool(((index["offset"] <= size) & (index["length"] <= size - index["offset"])).all()):
        raise DataError(
            f"The offset index {where} does not belong to its shard: a sample ends past its {size:,} bytes. "
            f"{_again(shard)}"
        )
    return index


def _again(shard: str) -> str:
    return f"Make it with `python -m vit_efficient.prepare index {shard}`."


@dataclass(frozen=True)
class Scan:
    """What reading a shard once from front to back shows.

    Args:
        entry: its line of the manifest.
        index: array of `INDEX_DTYPE`, one entry a sample.
    """

    entry: ShardEntry
    index: NDArray[np.void]


def scan_shard(path: Path) -> Scan:
    """Index a shard, whoever wrote it; memory stays flat but for the index.

    Raises:
        DataError: not a plain tar, truncated, empty, or a sample without image or label.
    """
    starts: list[int] = []
    stops: list[int] = []
    labels: list[int] = []
    key: str | None = None
    end = 0
    try:
        with tarfile.open(path, mode="r:") as archive:
            for group_key, start, stop, label in _samples(archive, path.name):
                key, end = group_key, stop
                starts.append(start)
                stops.append(stop)
                labels.append(label)
    except FileNotFoundError:
        raise DataError(f"The shard {path} is not there.") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole, uncompressed tar: {error}") from error
    if not starts:
        raise DataError(f"The shard {path} holds no samples.")
    if end > path.stat().st_size:
        raise DataError(f"{path} is truncated: its last sample, {key}, should end at byte {end:,}.")

    index = np.zeros(len(starts), INDEX_DTYPE)
    index["offset"] = starts
    index["length"] = np.array(stops) - np.array(starts)
    index["label"] = labels
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for row in index:
            digest.update(file.read(int(row["offset"]) - file.tell()))  # folders, comments: what is of no sample
            span = file.read(int(row["length"]))
            row["crc32"] = zlib.crc32(span)
            digest.update(span)
        while block := file.read(_BLOCK):
            digest.update(block)
    entry = ShardEntry(file=path.name, samples=len(starts), bytes=path.stat().st_size, sha256=digest.hexdigest())
    return Scan(entry, index)


def _samples(archive: tarfile.TarFile, name: str) -> Iterator[tuple[str, int, int, int]]:
    """(key, first byte, byte past the end, label) of each sample."""
    key: str | None = None
    start = end = 0
    extensions: set[str] = set()
    label: bytes | None = None

    def finished() -> tuple[str, int, int, int]:
        where = f"{name}, sample {key}"
        if not extensions.intersection(IMAGE_EXTENSIONS):
            raise BadSample(f"{where}: no image; looked for {', '.join(IMAGE_EXTENSIONS)}")
        number = parse_label(label, where)
        if number < 0:
            raise BadSample(f"{where}: label {number} is below 0")
        return str(key), start, end, number

    for member in archive:
        parts = key_and_extension(member.name)
        if not member.isreg() or parts is None:
            continue
        prefix, suffix = parts
        if prefix != key:
            if key is not None:
                yield finished()
            key, start, extensions, label = prefix, member.offset, set(), None
        extensions.add(suffix)
        if suffix == "cls":
            reader = archive.extractfile(member)
            label = reader.read() if reader is not None else None
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    if key is not None:
        yield finished()


def write_index(shard: Path, scan: Scan) -> None:
    """Write the offset index of a shard, atomically."""
    with atomic_writer(index_path(shard)) as file:
        np.save(file, scan.index, allow_pickle=False)


def count_classes(labels: NDArray[np.integer], classes: int = 0) -> NDArray[np.int64]:
    """How often each label occurs; `classes` long at least."""
    return np.bincount(labels.astype(np.int64), minlength=classes)
