"""From a source of images to folders of shards, whole or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vit_efficient.data import manifest as manifests
from vit_efficient.data.counter import Domain, hash_words, permute_index
from vit_efficient.data.files import locked, make_folder
from vit_efficient.data.manifest import LeftOut, Manifest, ShardEntry, read_manifest
from vit_efficient.data.resolve import ShardSet
from vit_efficient.data.shards import Encoded, ShardSize, count_classes, write_shards
from vit_efficient.data.sources.base import BadImage, Source, Split, Subset, stratified
from vit_efficient.errors import DataError

log = logging.getLogger(__name__)

DEFAULT_SIZE = ShardSize(bytes=256 << 20)
_UNFINISHED = ".unfinished"  # marks a folder that is being written
_BLOCK = 4096  # indices permuted at once


class Progress(Protocol):
    """Told of every image: which split, how many are done, how many there are."""

    def __call__(self, split: str, done: int, total: int) -> None: ...


def silent(split: str, done: int, total: int) -> None:
    """Nobody looks."""


@dataclass(frozen=True)
class Options:
    """What decides the shards besides the source.

    Args:
        val_fraction: share of each class set aside, for a source without a validation set.
        seed: of that choice and of the order in the shards.
        size: of a shard.
        max_bad: share of unusable images that stops the run.
    """

    val_fraction: float | None = None
    seed: int = 0
    size: ShardSize = DEFAULT_SIZE
    max_bad: float = 0.01


def prepare_source(
    source: Source, out: Path, options: Options | None = None, progress: Progress = silent
) -> dict[str, Manifest]:
    """Write `out/train` and, if there is one, `out/val`.

    A folder that is already complete is kept if it was made from the same input with the same options, so that a
    killed run can be started again.

    Returns:
        manifests by split.

    Raises:
        DataError: `out` holds something else, or another run writes to it, or too many images cannot be used.
    """
    options = options or Options()
    splits = _splits(source, options)
    make_folder(out)
    with locked(out):
        settings = {
            "seed": options.seed,
            "val_fraction": options.val_fraction,
            "shard_samples": options.size.samples,
            "shard_bytes": options.size.bytes,
            "input": source.identity,
        }
        for name in ("train", "val"):  # refuse before anything is written
            _finished(out / name, name, source, settings, expected=name in splits)
        return {
            name: _finished(out / name, name, source, settings, expected=True)
            or _write_split(source, name, split, out / name, settings, options, progress)
            for name, split in splits.items()
        }


def _splits(source: Source, options: Options) -> dict[str, Split]:
    splits = dict(source.splits)
    if options.val_fraction is None:
        return splits
    if "val" in splits:
        raise DataError(f"{source.name} has validation images of its own: leave out --val-fraction.")
    if not 0 < options.val_fraction < 1:
        raise DataError(f"--val-fraction {options.val_fraction:g} is not between 0 and 1.")
    whole = splits["train"]
    stay, aside = stratified(whole.labels, round(options.val_fraction * whole.labels.size), options.seed)
    if not aside.size:
        raise DataError(f"--val-fraction {options.val_fraction:g} of {whole.labels.size} images sets none aside.")
    return {"train": Subset(whole, stay), "val": Subset(whole, aside)}


def _finished(folder: Path, split: str, source: Source, settings: dict[str, Any], *, expected: bool) -> Manifest | None:
    """The manifest of a folder that is as asked for; None where nothing is finished."""
    if not (folder / manifests.NAME).exists():
        return None
    manifest = read_manifest(folder)
    same = (manifest.source, manifest.split, manifest.options) == (source.name, split, settings)
    if not expected or not same:
        raise DataError(
            f"{folder} is already prepared, from {manifest.source} with other input or options. "
            "Choose another --out, or remove the folder first."
        )
    ShardSet(folder, manifest).check_sizes()
    (folder / _UNFINISHED).unlink(missing_ok=True)
    return manifest


def _write_split(
    source: Source,
    name: str,
    split: Split,
    folder: Path,
    settings: dict[str, Any],
    options: Options,
    progress: Progress,
) -> Manifest:
    _begin(folder)
    left_out: list[LeftOut] = []
    counts = np.zeros(len(source.class_names), np.int64)
    entries: list[ShardEntry] = []
    samples = _shuffled(source, name, split, options, left_out, progress)
    try:
        for scan in write_shards(samples, folder, name, options.size):
            entries.append(scan.entry)
            counts += count_classes(scan.index["label"], counts.size)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Mend that, and start this again.") from error
    if not entries:
        raise DataError(f"{source.name}: there are no images for {name}.")
    manifest = Manifest(
        source=source.name,
        options=settings,
        split=name,
        class_names=source.class_names,
        class_counts=tuple(counts.tolist()),
        shards=tuple(entries),
        left_out=tuple(left_out),
    )
    manifest.write(folder)
    (folder / _UNFINISHED).unlink()
    return manifest


def _begin(folder: Path) -> None:
    """An empty folder, marked as ours; what a killed run of ours left in it goes, what is somebody else's does not."""
    make_folder(folder)
    marker = folder / _UNFINISHED
    if marker.exists():
        for path in folder.iterdir():
            if path != marker:
                path.unlink()
    elif any(folder.iterdir()):
        raise DataError(
            f"{folder} is not empty, and was not made by a run of this command that was cut short. "
            "Choose another --out, or empty it first."
        )
    else:
        marker.touch()


def _shuffled(
    source: Source, name: str, split: Split, options: Options, left_out: list[LeftOut], progress: Progress
) -> Iterator[Encoded]:
    """Images in a permutation of the whole set, so that no shard is of one class; bad ones go to `left_out`."""
    total = split.labels.size
    digits = max(8, len(str(total)))
    key = hash_words(Domain.SOURCE_ORDER, options.seed, int(name == "val"))
    for start in range(0, total, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, total))
        order = permute_index(block, np.full(block.size, total), np.full(block.size, key[0]))
        for done, index in enumerate(order.tolist(), start + 1):
            try:
                image = split.read(index)
            except BadImage as error:
                left_out.append(LeftOut(name=split.name(index), reason=str(error)))
                if len(left_out) > options.max_bad * total:
                    raise _too_many(source, left_out, total, options.max_bad) from error
                log.warning("left out: %s: %s", split.name(index), error)
            else:
                sample = f"{index:0{digits}d}_{clean(image.name)}"
                yield Encoded(sample, image.data, image.extension, int(split.labels[index]))
            progress(name, done, total)


def _too_many(source: Source, left_out: list[LeftOut], total: int, most: float) -> DataError:
    listed = "\n    ".join(f"{item.name}: {item.reason}" for item in left_out[:10])
    return DataError(
        f"{source.name}: {len(left_out)} of {total} images cannot be used, more than {most:.1%}:\n"
        f"    {listed}\nMend or remove them, or allow a greater share with --max-bad."
    )


def clean(name: str) -> str:
    """A name fit for a sample's key: no dots (they would end the key), no folders, ASCII, at most 60 characters."""
    stem = name.rsplit(".", 1)[0] if "." in name.rsplit("/", 1)[-1] else name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[-60:]
