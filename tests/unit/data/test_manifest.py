from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_efficient.data.manifest import Manifest, read_manifest
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.errors import DataError


def test_round_trip(make_shards: Callable[..., ShardSet]) -> None:
    shards = make_shards([3, 2])
    again = read_manifest(shards.folder)
    assert again == shards.manifest
    assert again.samples == 5
    assert again.class_counts == (2, 2, 1)


def test_fingerprint_follows_contents_and_not_names(make_shards: Callable[..., ShardSet]) -> None:
    manifest = make_shards([3, 2]).manifest
    renamed = manifest.model_copy(
        update={"shards": tuple(s.model_copy(update={"file": f"y{s.file}"}) for s in manifest.shards)}
    )
    assert renamed.fingerprint == manifest.fingerprint
    other = manifest.model_copy(update={"shards": manifest.shards[::-1]})
    assert other.fingerprint != manifest.fingerprint
    other = manifest.model_copy(update={"class_names": ("a", "b", "d")})
    assert other.fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: {**raw, "version": 2}, "newer vit_efficient"),
        (lambda raw: {**raw, "extra": 1}, "extra"),
        (lambda raw: {**raw, "shards": [{"file": "x"}]}, r"shards\.0"),
        (lambda raw: {**raw, "shards": []}, "names no shards"),
        (lambda raw: {**raw, "class_counts": [1]}, "differ in length"),
        (lambda raw: [raw], "not a manifest"),
        (lambda raw: "{", "not a manifest"),
    ],
)
def test_bad_manifests_are_refused(
    make_shards: Callable[..., ShardSet], change: Callable[[dict], object], message: str
) -> None:
    folder = make_shards([2]).folder
    path = folder / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message):
        read_manifest(folder)


def test_damaged_or_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare index"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1, "sou')
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path)


def test_manifest_is_immutable(make_shards: Callable[..., ShardSet]) -> None:
    manifest: Manifest = make_shards([2]).manifest
    with pytest.raises(ValueError, match="frozen"):
        manifest.split = "val"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../../elsewhere.tar"),
        ("file", "/etc/passwd.tar"),
        ("file", "a\\b.tar"),
        ("file", "x.txt"),
        ("sha256", "/tmp/victim"),
        ("sha256", "0" * 63),
        ("sha256", "G" * 64),
    ],
)
def test_a_strangers_manifest_names_files_and_digests_only(tmp_path: Path, key: str, value: str) -> None:
    """Both become names of files, in the shards' folder and in a cache."""
    entry = {"file": "x.tar", "samples": 1, "bytes": 1, "sha256": "0" * 64} | {key: value}
    whole = {"source": "x", "options": {}, "split": "train", "class_names": ["a"], "class_counts": [1]}
    (tmp_path / "manifest.json").write_text(json.dumps(whole | {"shards": [entry]}))
    with pytest.raises(DataError, match=f"not a manifest: shards.0.{key}"):
        read_manifest(tmp_path)
