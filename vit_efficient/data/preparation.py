"""From a source of images to folders of shards, whole or not at all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vit_efficient import __version__
from vit_efficient.data import journal as journals
from vit_efficient.data import manifest as manifests
from vit_efficient.data.counter import Domain, hash_words
from vit_efficient.data.encode import Recode
from vit_efficient.data.files import locked, make_folder, writing
from vit_efficient.data.journal import Journal, open_journal
from vit_efficient.data.manifest import LeftOut, Manifest, read_manifest
from vit_efficient.data.pool import Work, make_all
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import Encoded, ShardSize, write_shards
from vit_efficient.data.shards import count_classes, read_index
from vit_efficient.data.sources.base import Source, Split, Subset, stratified
from vit_efficient.data.sources.staging import staged
from vit_efficient.errors import DataError

log = logging.getLogger(__name__)

DEFAULT_SIZE = ShardSize(bytes=256 << 20)
NO_RECODE = Recode()
_MOST_LISTED = 20  # images left out, by name; the manifest has them all


class Progress(Protocol):
    """Told how far it is: which part (a split), how many are done, how many there are, how many bytes that made."""

    def __call__(self, part: str, done: int, total: int, volume: int = 0) -> None: ...


def silent(part: str, done: int, total: int, volume: int = 0) -> None:
    """Nobody looks."""


@dataclass(frozen=True)
class Options:
    """What decides the shards besides the source.

    Args:
        val_fraction: share of each class set aside, for a source without a validation set.
        seed: of that choice and of the order in the shards.
        size: of a shard.
        max_bad: share of unusable images that stops the run.
        recode: what becomes of large images.
        processes: that read and check images; decides nothing but the time.
        patience: seconds that one process may take alone before the others are started; likewise.
    """

    val_fraction: float | None = None
    seed: int = 0
    size: ShardSize = DEFAULT_SIZE
    max_bad: float = 0.01
    recode: Recode = NO_RECODE
    processes: int = 1
    patience: float = 0.0


def prepare_source(
    source: Source, out: Path, options: Options | None = None, progress: Progress = silent
) -> dict[str, Manifest]:
    """Write `out/train` and, if there is one, `out/val`.

    A folder that is already complete is kept if it was made from the same input with the same options; one that a
    killed run left goes on from its last whole shard. The bytes are the same in either case.

    Returns:
        manifests by split.

    Raises:
        DataError: `out` holds something else, or another run writes to it, or too many images cannot be used.
    """
    options = options or Options()
    splits = _splits(source, options)
    make_folder(out)
    with writing(out), locked(out):
        settings = {
            "seed": options.seed,
            "val_fraction": options.val_fraction,
            "shard_samples": options.size.samples,
            "shard_bytes": options.size.bytes,
            **_recoding(options.recode),
            "input": source.identity,
        }
        for name in ("train", "val"):  # refuse before anything is written
            _finished(out / name, name, source, settings, expected=name in splits)
        return {
            name: _finished(out / name, name, source, settings, expected=True)
            or _write_split(source, name, split, out / name, settings, options, progress)
            for name, split in splits.items()
        }


def _recoding(recode: Recode) -> dict[str, int]:
    if recode.shortest_side is None:
        return {}
    return {"shortest_side": recode.shortest_side, "quality": recode.quality}


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
    ShardSet(folder, manifest).check()
    (folder / journals.NAME).unlink(missing_ok=True)
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
    make_folder(folder)
    written_by = f"vit_efficient {__version__}"
    journal = open_journal(folder, settings | {"source": source.name, "split": name, "written_by": written_by})
    noted = len(journal.left_out)
    try:
        with staged(split, folder.with_name(f".{name}-images"), partial(progress, f"{name}, copied first")) as readable:
            feed = _Feed(source, name, readable, options, journal, progress)
            for scan in write_shards(feed, folder, name, options.size, first=len(journal.shards)):
                journal.add(scan.entry, feed.position, feed.left_out[noted:])
                noted = len(feed.left_out)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Mend that, and start this again.") from error
    if not journal.shards:
        raise DataError(f"{source.name}: there are no images for {name}.")
    counts = np.zeros(len(source.class_names), np.int64)
    for entry in journal.shards:
        counts += count_classes(read_index(folder / entry.file, entry.samples)["label"], counts.size)
    manifest = Manifest(
        written_by=written_by,
        source=source.name,
        options=settings,
        split=name,
        class_names=source.class_names,
        class_counts=tuple(counts.tolist()),
        shards=tuple(journal.shards),
        left_out=tuple(feed.left_out),
    )
    manifest.write(folder)
    journal.remove()
    return manifest


class _Feed:
    """The samples of a split in a permutation of the whole set, so that no shard is of one class.

    Attributes:
        position: of the sample given last, in that order; at the end, how many images there are.
        left_out: images that cannot be used, up to there.
    """

    def __init__(
        self, source: Source, name: str, split: Split, options: Options, journal: Journal, progress: Progress
    ) -> None:
        self._source, self._name, self._split, self._options = source, name, split, options
        self._progress = progress
        self.position = self._start = journal.position
        self.left_out = list(journal.left_out)
        self._volume = sum(entry.bytes for entry in journal.shards)

    def __iter__(self) -> Iterator[Encoded]:
        total = self._split.labels.size
        digits = max(8, len(str(total)))
        options = self._options
        order = int(hash_words(Domain.SOURCE_ORDER, options.seed, int(self._name == "val"))[0])
        work = Work(self._split, order, options.recode)
        self._progress(self._name, self._start, total, self._volume)
        for place, made in enumerate(make_all(work, self._start, options.processes, options.patience), self._start):
            if made.reason is None:
                self.position = place
                key = f"{made.index:0{digits}d}_{clean(made.name)}"
                yield (sample := Encoded(key, made.data, made.extension, made.label))
                self._volume += sample.size
            else:
                self.left_out.append(LeftOut(name=made.name, reason=made.reason))
                self._warn()
                if len(self.left_out) > options.max_bad * total:
                    raise _too_many(self._source, self.left_out, total, options.max_bad)
            self._progress(self._name, place + 1, total, self._volume)
        self.position = total

    def _warn(self) -> None:
        """Of the last one left out; a log is no place for thousands of them."""
        if len(self.left_out) <= _MOST_LISTED:
            log.warning("left out: %s: %s", self.left_out[-1].name, self.left_out[-1].reason)
        elif len(self.left_out) == _MOST_LISTED + 1:
            log.warning("left out: more, which the manifest will list")


def _too_many(source: Source, left_out: list[LeftOut], total: int, most: float) -> DataError:
    listed = "\n    ".join(f"{item.name}: {item.reason}" for item in left_out[:_MOST_LISTED])
    if len(left_out) > _MOST_LISTED:
        listed += f"\n    and {len(left_out) - _MOST_LISTED:,} more"
    return DataError(
        f"{source.name}: {len(left_out)} of {total} images cannot be used, more than {most:.1%}:\n"
        f"    {listed}\nMend or remove them, or allow a greater share with --max-bad."
    )


def clean(name: str) -> str:
    """A name fit for a sample's key: no dots (they would end the key), no folders, ASCII, at most 60 characters."""
    stem = name.rsplit(".", 1)[0] if "." in name.rsplit("/", 1)[-1] else name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[-60:]
