"""Checks a folder of shards against its manifest and indices, down to every byte."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data import journal as journals
from vit_efficient.data import manifest as manifests
from vit_efficient.data.encode import checked
from vit_efficient.data.files import sha256_of
from vit_efficient.data.manifest import Manifest, ShardEntry, read_manifest
from vit_efficient.data.preparation import Progress
from vit_efficient.data.processes import worker_pool
from vit_efficient.data.samples import BadSample, Sample, parse_sample
from vit_efficient.data.shards import count_classes, read_index
from vit_efficient.data.sources.base import BadImage
from vit_efficient.errors import DataError

_MOST = 20  # faults listed of one shard


@dataclass
class Checked:
    """What is known of one shard.

    Args:
        file: its name.
        counts: samples of each class.
        bytes: its size.
        faults: what is wrong, a line each.
        keys: 64-bit digests of its samples' keys.
    """

    file: str
    counts: NDArray[np.int64]
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))


def verify_folder(folder: Path, progress: Progress, processes: int = 1, *, decode: bool = True) -> Iterator[str]:
    """Check sizes, digests, indices, labels, keys and, unless told not to, that every image decodes.

    Args:
        folder: with a manifest.
        progress: told of every shard.
        processes: that share the shards.
        decode: decode every image; that is most of the work.

    Yields:
        each fault as it is found, those that only the whole shows last.

    Raises:
        DataError: there is no manifest to check against.
    """
    if (folder / journals.NAME).exists() and not (folder / manifests.NAME).exists():
        yield f"{folder}: not finished; the command that prepares it goes on from the last whole shard"
        return
    manifest = read_manifest(folder)
    keys, counts, volume = [], np.zeros(len(manifest.class_names), np.int64), 0
    progress(folder.name, 0, len(manifest.shards))
    for done, shard in enumerate(_each(folder, manifest, processes, decode), 1):
        volume += shard.bytes
        progress(folder.name, done, len(manifest.shards), volume)
        keys.append(shard.keys)
        counts += shard.counts
        yield from (f"{folder / shard.file}: {fault}" for fault in shard.faults)
    yield from _whole(folder, manifest, np.concatenate(keys), counts)


def _each(folder: Path, manifest: Manifest, processes: int, decode: bool) -> Iterator[Checked]:
    classes = len(manifest.class_names)
    if processes == 1 or len(manifest.shards) == 1:
        for entry in manifest.shards:
            yield check_shard(folder, entry, classes, decode)
        return
    with worker_pool(processes, "Start the same command again, with fewer --processes.") as pool:
        tasks = [pool.submit(check_shard, folder, entry, classes, decode) for entry in manifest.shards]
        for task in as_completed(tasks):
            yield task.result()


def _whole(folder: Path, manifest: Manifest, keys: NDArray[np.uint64], counts: NDArray[np.int64]) -> Iterator[str]:
    if repeated := keys.size - np.unique(keys).size:
        yield f"{folder}: {repeated} samples have the key of another one"
    for name, found, said in zip(manifest.class_names, counts.tolist(), manifest.class_counts, strict=True):
        if found != said:
            yield f"{folder}: class {name} has {found:,} samples, {said:,} in the manifest"
    known = {entry.file for entry in manifest.shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in known:
            yield f"{path}: not in the manifest"


def check_shard(folder: Path, entry: ShardEntry, classes: int, decode: bool) -> Checked:
    """Everything about one shard; never more than one sample of it in memory."""
    path, result = folder / entry.file, Checked(entry.file, np.zeros(classes, np.int64))
    faults = result.faults
    try:
        result.bytes = path.stat().st_size
        if result.bytes != entry.bytes:
            faults.append(f"{result.bytes:,} bytes, {entry.bytes:,} in the manifest")
        if sha256_of(path) != entry.sha256:
            faults.append("its sha256 is not the manifest's")
        index = read_index(path, entry.samples, entry.bytes)
        labels = index["label"]
        result.counts = count_classes(labels[labels < classes], classes)
        with open(path, "rb") as file:
            found = (
                _sample(span, row, number, classes, decode, faults)
                for number, (row, span) in enumerate(_spans(file, index, result.bytes, faults))
                if span is not None
            )
            keys = [_digest(sample.key) for sample in found if sample is not None]
        result.keys = np.array(keys, np.uint64)
    except FileNotFoundError:
        faults.append("not there")
    except (OSError, DataError) as error:
        faults.append(str(error))
    if len(faults) > _MOST:
        faults[_MOST:] = [f"and {len(faults) - _MOST} faults more"]
    return result


def _spans(
    file: BinaryIO, index: NDArray[np.void], size: int, faults: list[str]
) -> Iterator[tuple[np.void, bytes | None]]:
    """Each line of the index with the bytes that it names, if the file has them."""
    before = int(index[0]["offset"])
    for number, row in enumerate(index):
        offset, end = int(row["offset"]), int(row["offset"]) + int(row["length"])
        if offset != before:
            faults.append(f"sample number {number} begins at byte {offset:,}, says the index, and not at {before:,}")
        before = end
        if end > size:
            faults.append(f"sample number {number} ends at byte {end:,}, says the index, behind the shard's end")
            yield row, None
            continue
        file.seek(offset)
        yield row, file.read(end - offset)


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def _sample(span: bytes, row: np.void, number: int, classes: int, decode: bool, faults: list[str]) -> Sample | None:
    where = f"sample number {number}"
    try:
        sample = parse_sample(span, where)
    except BadSample as error:
        faults.append(str(error))
        return None
    where = f"sample {sample.key} (number {number})"
    if zlib.crc32(span) != row["crc32"]:
        faults.append(f"{where}: its bytes are not those that were written")
    elif sample.label != row["label"]:
        faults.append(f"{where}: label {sample.label}, {row['label']} in the index")
    elif sample.label >= classes:
        faults.append(f"{where}: label {sample.label} is out of range; there are {classes} classes")
    elif decode:
        try:
            checked(sample.image)
        except BadImage as error:
            faults.append(f"{where}: the image cannot be decoded: {error}")
    return sample
