"""From what a recipe says (`data.shards`, `data.eval_shards`) to the folders and manifests that it means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from vit_efficient.data import manifest as manifests
from vit_efficient.data.manifest import parse_manifest, read_manifest
from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.remote.folder import RemoteFolder, is_url, without_credentials
from vit_efficient.data.remote.retry import Absent
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shards import count_classes
from vit_efficient.errors import DataError

_PREPARE = "Make shards with `python -m vit_efficient.prepare SOURCE --out DIR` and set data.shards=DIR."


@dataclass(frozen=True)
class Shards:
    """What to train on (None: nothing, only evaluation was asked for) and what to evaluate on."""

    train: ShardSet | None
    eval: ShardSet


def resolve_shards(
    shards: str | None,
    eval_shards: str | None = None,
    *,
    evaluate_only: bool = False,
    remote: RemoteConfig | None = None,
) -> Shards:
    """Find both shard sets.

    Args:
        shards: a folder with a manifest, the parent of such folders `train` and `val`, or a brace pattern; a local path
            or a URL.
        eval_shards: likewise; unset: the `val` folder beside the training shards.
        evaluate_only: training shards that are absent are nobody's concern, if `eval_shards` is set.
        remote: how to read what lies at a URL.

    Raises:
        DataError: nothing there, nothing in it, no manifest, or classes that differ.
    """
    remote = remote or RemoteConfig()
    if evaluate_only and eval_shards is not None and not _present(shards):
        shards = None
    train = open_shards(shards, "data.shards", "train", remote) if shards is not None else None
    if eval_shards is not None:
        evaluation = open_shards(eval_shards, "data.eval_shards", "val", remote)
    elif train is None:
        raise DataError(f"data.shards is not set. {_PREPARE}")
    else:
        evaluation = _sibling(train)
    if train is not None:
        _same_classes(train, evaluation)
    return Shards(train, evaluation)


def _present(shards: str | None) -> bool:
    return shards is not None and (is_url(shards) or "{" in shards or Path(shards).expanduser().exists())


def _sibling(train: ShardSet) -> ShardSet:
    """The folder `val` beside the training shards."""
    folder = train.folder
    if isinstance(folder, RemoteFolder):
        beside = folder.sibling("val")
        if beside is not None and (text := _manifest_at(beside)) is not None:
            return ShardSet(beside, parse_manifest(text, beside.shown(manifests.NAME)))
        shown = "val" if beside is None else str(beside)
    else:
        sibling = folder.parent / "val"
        if (sibling / manifests.NAME).is_file():
            return ShardSet(sibling, read_manifest(sibling))
        shown = str(sibling)
    raise DataError(
        f"Nothing to evaluate on: {folder} has no sibling folder {shown} with a manifest. "
        "Set data.eval_shards, or prepare with --val-fraction 0.1."
    )


def open_shards(text: str, key: str, split: str, remote: RemoteConfig | None = None) -> ShardSet:
    """One shard set.

    Args:
        text: as a recipe names it.
        key: of the recipe, for messages.
        split: the child folder to take of a parent.
        remote: how to read what lies at a URL.

    Raises:
        DataError: nothing there, nothing in it, or no manifest.
    """
    if "{" in text or text.endswith(".tar"):
        return _open_pattern(text, key, remote or RemoteConfig())
    if is_url(text):
        return _open_remote(RemoteFolder(text, remote or RemoteConfig()), key, split)
    path = Path(text).expanduser()
    if not path.is_dir():
        raise DataError(f"{key}={text}: there is no such folder. {_PREPARE}")
    if not (path / manifests.NAME).is_file() and (path / split / manifests.NAME).is_file():
        path = path / split
    elif not any(path.iterdir()):
        raise DataError(f"{key}={text}: the folder is empty. {_PREPARE}")
    return ShardSet(path, read_manifest(path))


def _open_remote(folder: RemoteFolder, key: str, split: str) -> ShardSet:
    for place in (folder, folder.child(split)):
        if (text := _manifest_at(place)) is not None:
            return ShardSet(place, parse_manifest(text, place.shown(manifests.NAME)))
    raise DataError(
        f"{key}={folder}: there is no {manifests.NAME}, nor {split}/{manifests.NAME}. Shards, indices and manifest "
        "must lie in one folder, as `python -m vit_efficient.prepare` writes them."
    )


def _manifest_at(folder: RemoteFolder) -> bytes | None:
    try:
        return folder.read(manifests.NAME)
    except Absent:
        return None


def _open_pattern(text: str, key: str, remote: RemoteConfig) -> ShardSet:
    """The shards that a brace pattern names, of the manifest beside them."""
    where, files = split_pattern(text)
    shown = without_credentials(text)
    folder: Path | RemoteFolder
    if is_url(where):
        folder = RemoteFolder(where, remote)
        manifest = parse_manifest(folder.read(manifests.NAME), folder.shown(manifests.NAME))
    else:
        folder = Path(where).expanduser()
        manifest = read_manifest(folder)
    numbers = {entry.file: number for number, entry in enumerate(manifest.shards)}
    missing = [file for file in files if file not in numbers]
    if missing:
        raise DataError(
            f"{key}={shown}: the manifest in {folder} does not list {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. "
            f"Run `python -m vit_efficient.prepare index '{shown}'`."
        )
    chosen = tuple(manifest.shards[numbers[file]] for file in files)
    if len(chosen) == len(manifest.shards) and isinstance(folder, RemoteFolder):
        # all of them: no need to fetch every index for the counts
        return ShardSet(folder, manifest.model_copy(update={"shards": chosen}))
    every, counts = ShardSet(folder, manifest), np.zeros(len(manifest.class_names), np.int64)
    for file in files:
        found = count_classes(every.index(numbers[file])["label"], counts.size)
        if found.size > counts.size:
            raise DataError(
                f"{every.name(numbers[file])}: label {found.size - 1} is out of range; the manifest has "
                f"{counts.size} classes."
            )
        counts += found
    update = {"shards": chosen, "class_counts": tuple(counts.tolist())}
    return ShardSet(folder, manifest.model_copy(update=update))


def split_pattern(pattern: str) -> tuple[str, list[str]]:
    """Folder and file names of a brace pattern such as `x-{000000..000003}.tar`.

    Raises:
        DataError: it is none, names a file twice, or files of several folders.
    """
    shown = without_credentials(pattern)
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"{shown}: not a brace pattern: {error}. Example: x-{{000000..000003}}.tar") from error
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) != 1:
        raise DataError(f"{shown}: the shards of one pattern must lie in one folder")
    if len(set(names)) != len(names):
        raise DataError(f"{shown}: names a shard twice")
    return folders.pop() or ".", [name.rpartition("/")[2] for name in names]


def expand(pattern: str) -> list[Path]:
    """Local files of a brace pattern, all in one folder."""
    folder, names = split_pattern(pattern)
    if is_url(folder):
        shown = without_credentials(pattern)
        raise DataError(f"{shown}: shards are indexed where they lie, not over a network. Index them there.")
    return [Path(folder).expanduser() / name for name in names]


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
