"""Offset indices and a manifest for shards that others wrote."""

from __future__ import annotations

import numpy as np

from vit_efficient.data import manifest as manifests
from vit_efficient.data.files import locked
from vit_efficient.data.manifest import Manifest, ShardEntry, read_manifest
from vit_efficient.data.preparation import Progress, silent
from vit_efficient.data.resolve import expand
from vit_efficient.data.shards import count_classes, read_index, scan_shard, write_index
from vit_efficient.errors import DataError


def index_pattern(pattern: str, class_names: tuple[str, ...] | None = None, progress: Progress = silent) -> Manifest:
    """Index shards whose samples are `KEY.jpg` (or png, webp, ...) and `KEY.cls`; write their manifest.

    Several patterns of one folder share its manifest: shards that it lists already stay.

    Args:
        pattern: such as `shards/train-{000000..000099}.tar`.
        class_names: by label; None: the labels themselves, as many as occur.

    Raises:
        DataError: a shard is absent, damaged, or has samples without image or label.
    """
    paths = expand(pattern)
    folder = paths[0].parent
    if not folder.is_dir():
        raise DataError(f"{pattern}: there is no folder {folder}.")
    with locked(folder):
        entries: dict[str, ShardEntry] = {}
        if (folder / manifests.NAME).exists():
            known = read_manifest(folder)
            if known.source != "index":
                raise DataError(f"{folder} already has a manifest, made from {known.source}. It was left as it is.")
            entries = {entry.file: entry for entry in known.shards}
        for done, path in enumerate(paths, 1):
            scan = scan_shard(path)
            write_index(path, scan)
            entries[path.name] = scan.entry
            progress("index", done, len(paths))
        shards = tuple(entries[name] for name in sorted(entries))
        counts = np.zeros(0, np.int64)
        for entry in shards:
            found = count_classes(read_index(folder / entry.file, entry.samples)["label"], counts.size)
            found[: counts.size] += counts
            counts = found
        names = class_names or tuple(str(label) for label in range(counts.size))
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
