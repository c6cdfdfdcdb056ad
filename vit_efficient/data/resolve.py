"""From what a recipe says (`data.shards`, `data.eval_shards`) to the folders and manifests that it means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from vit_efficient.data import manifest as manifests
from vit_efficient.data.manifest import Manifest, read_manifest
from vit_efficient.data.shards import count_classes, read_index
from vit_efficient.errors import DataError

_PREPARE = "Make shards with `python -m vit_efficient.prepare SOURCE --out DIR` and set data.shards=DIR."


@dataclass(frozen=True)
class ShardSet:
    """Shards that belong together, and where they lie."""

    folder: Path
    manifest: Manifest

    def path(self, number: int) -> Path:
        """File of shard `number`, as the manifest counts."""
        return self.folder / self.manifest.shards[number].file

    def check_sizes(self) -> None:
        """Compare every shard's size with the manifest.

        Raises:
            DataError: shards that are absent or truncated, the first five by name.
        """
        wrong = []
        for entry in self.manifest.shards:
            try:
                size = (self.folder / entry.file).stat().st_size
            except FileNotFoundError:
                wrong.append(f"{entry.file} is not there")
                continue
            if size != entry.bytes:
                kind = "truncated" if size < entry.bytes else "not the one prepared"
                wrong.append(f"{entry.file} is {kind}: {size:,} bytes, {entry.bytes:,} in the manifest")
        if wrong:
            more = f"\n    and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            listed = "\n    ".join(wrong[:5])
            raise DataError(f"Damaged shards in {self.folder}:\n    {listed}{more}\nCopy or prepare them again.")


@dataclass(frozen=True)
class Shards:
    """What to train on (None: nothing, only evaluation was asked for) and what to evaluate on."""

    train: ShardSet | None
    eval: ShardSet


def resolve_shards(shards: str | None, eval_shards: str | None = None, *, evaluate_only: bool = False) -> Shards:
    """Find both shard sets.

    Args:
        shards: a folder with a manifest, the parent of such folders `train` and `val`, or a brace pattern.
        eval_shards: likewise; unset: the `val` folder beside the training shards.
        evaluate_only: training shards that are absent are nobody's concern, if `eval_shards` is set.

    Raises:
        DataError: nothing there, nothing in it, no manifest, or classes that differ.
    """
    if evaluate_only and eval_shards is not None and not _present(shards):
        shards = None
    train = _open(shards, "data.shards", "train") if shards is not None else None
    if eval_shards is not None:
        evaluation = _open(eval_shards, "data.eval_shards", "val")
    elif train is None:
        raise DataError(f"data.shards is not set. {_PREPARE}")
    else:
        sibling = train.folder.parent / "val"
        if not (sibling / manifests.NAME).is_file():
            raise DataError(
                f"Nothing to evaluate on: {train.folder} has no sibling folder {sibling} with a manifest. "
                "Set data.eval_shards, or prepare with --val-fraction 0.1."
            )
        evaluation = ShardSet(sibling, read_manifest(sibling))
    if train is not None:
        _same_classes(train, evaluation)
    return Shards(train, evaluation)


def _present(shards: str | None) -> bool:
    return shards is not None and ("{" in shards or Path(shards).expanduser().exists())


def _open(text: str, key: str, split: str) -> ShardSet:
    """One shard set; `split` is the child folder to take of a parent."""
    if "{" in text:
        return _open_pattern(text, key)
    path = Path(text).expanduser()
    if path.suffix == ".tar":
        return _open_pattern(text, key)
    if not path.is_dir():
        raise DataError(f"{key}={text}: there is no such folder. {_PREPARE}")
    if not (path / manifests.NAME).is_file() and (path / split / manifests.NAME).is_file():
        path = path / split
    elif not any(path.iterdir()):
        raise DataError(f"{key}={text}: the folder is empty. {_PREPARE}")
    return ShardSet(path, read_manifest(path))


def _open_pattern(text: str, key: str) -> ShardSet:
    """The shards that a brace pattern names, of the manifest beside them."""
    paths = expand(text)
    folder = paths[0].parent
    manifest = read_manifest(folder)
    known = {entry.file: entry for entry in manifest.shards}
    missing = [path.name for path in paths if path.name not in known]
    if missing:
        raise DataError(
            f"{key}={text}: the manifest in {folder} does not list {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. "
            f"Run `python -m vit_efficient.prepare index '{text}'`."
        )
    chosen = tuple(known[path.name] for path in paths)
    counts = np.zeros(len(manifest.class_names), np.int64)
    for path, entry in zip(paths, chosen, strict=True):
        found = count_classes(read_index(path, entry.samples)["label"], counts.size)
        if found.size > counts.size:
            raise DataError(f"{path}: label {found.size - 1} is out of range; the manifest has {counts.size} classes.")
        counts += found
    update = {"shards": chosen, "class_counts": tuple(counts.tolist())}
    return ShardSet(folder, manifest.model_copy(update=update))


def expand(pattern: str) -> list[Path]:
    """Files of a brace pattern such as `x-{000000..000003}.tar`, all in one folder."""
    try:
        paths = [Path(text).expanduser() for text in braceexpand(pattern)]
    except ValueError as error:
        raise DataError(f"{pattern}: not a brace pattern: {error}. Example: x-{{000000..000003}}.tar") from error
    if len({path.parent for path in paths}) != 1:
        raise DataError(f"{pattern}: the shards of one pattern must lie in one folder")
    if len(set(paths)) != len(paths):
        raise DataError(f"{pattern}: names a shard twice")
    return paths


def _same_classes(train: ShardSet, evaluation: ShardSet) -> None:
    """The names must agree label by label; evaluation may lack the last classes."""
    ours, theirs = train.manifest.class_names, evaluation.manifest.class_names
    if ours[: len(theirs)] == theirs:
        return
    label = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
    name = ours[label] if label < len(ours) else "nothing"
    raise DataError(
        f"Training and evaluation shards name their classes differently: label {label} is {name!r} in "
        f"{train.folder} and {theirs[label]!r} in {evaluation.folder}. Prepare both from one source."
    )
