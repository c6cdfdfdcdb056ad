"""Offset indices and a manifest for shards that others wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vit_efficient.data import manifest as manifests
from vit_efficient.data.files import locked, writing
from vit_efficient.data.manifest import Manifest, ShardEntry, read_manifest
from vit_efficient.data.preparation import Progress, silent
from vit_efficient.data.processes import worker_pool
from vit_efficient.data.resolve import expand
from vit_efficient.data.shards import Scan, count_classes, read_index, scan_shard, write_index
from vit_efficient.errors import DataError

_FEW = 8  # shards that are read before other processes have started


def index_pattern(
    pattern: str, class_names: tuple[str, ...] | None = None, progress: Progress = silent, processes: int = 1
) -> Manifest:
    """Index shards whose samples are `KEY.jpg` (or png, webp, ...) and `KEY.cls`; write their manifest.

    Several patterns of one folder share its manifest: shards that it lists already stay.

    Args:
        pattern: such as `shards/train-{000000..000099}.tar`.
        class_names: by label; None: the labels themselves, as many as occur.
        progress: told of every shard.
        processes: that share the shards.

    Raises:
        DataError: a shard is absent, damaged, or has samples without image or label.
    """
    paths = expand(pattern)
    folder = paths[0].parent
    if not folder.is_dir():
        raise DataError(f"{pattern}: there is no folder {folder}.")
    with writing(folder), locked(folder):
        entries: dict[str, ShardEntry] = {}
        named: tuple[str, ...] | None = class_names
        if (folder / manifests.NAME).exists():
            known = read_manifest(folder)
            if known.source != "index":
                raise DataError(f"{folder} already has a manifest, made from {known.source}. It was left as it is.")
            entries = {entry.file: entry for entry in known.shards if (folder / entry.file).exists()}
            numbers = tuple(str(label) for label in range(len(known.class_names)))
            if named is None and known.class_names != numbers:
                named = known.class_names
        volume = 0
        progress("index", 0, len(paths))
        for done, (path, scan) in enumerate(_scans(paths, processes), 1):
            write_index(path, scan)
            entries[path.name] = scan.entry
            volume += scan.entry.bytes
            progress("index", done, len(paths), volume)
        shards = tuple(entries[name] for name in sorted(entries))
        counts = np.zeros(0, np.int64)
        for entry in shards:
            found = count_classes(read_index(folder / entry.file, entry.samples)["label"], counts.size)
            found[: counts.size] += counts
            counts = found
        names = named if named is not None else tuple(str(label) for label in range(counts.size))
        if counts.size > len(names):
            raise DataError(f"{pattern}: label {counts.size - 1} is out of range; {len(names)} class names were given.")
        counts = np.pad(counts, (0, len(names) - counts.size))
        manifest = Manifest(
            source="index",
            options={},
            split="all",
            class_names=names,
            class_counts=tuple(counts.tolist()),
            shards=shards,
        )
        manifest.write(folder)
    return manifest


def _scans(paths: list[Path], processes: int) -> Iterator[tuple[Path, Scan]]:
    if processes == 1 or len(paths) < _FEW:
        for path in paths:
            yield path, scan_shard(path)
        return
    with worker_pool(processes, "Start the same command again, with fewer --processes.") as pool:
        yield from zip(paths, pool.map(scan_shard, paths), strict=True)
