from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_efficient.data.indexing import index_pattern
from vit_efficient.data.resolve import resolve_shards
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.errors import DataError

Make = Callable[..., ShardSet]


def test_parent_folder_and_its_children(make_shards: Make) -> None:
    train, val = make_shards([3, 2]), make_shards([2], "val")
    for text in (train.folder.parent, train.folder):
        found = resolve_shards(str(text))
        assert found.train is not None
        assert (found.train.folder, found.eval.folder) == (train.folder, val.folder)
    found = resolve_shards(str(train.folder), str(train.folder))
    assert found.eval.folder == train.folder
    assert resolve_shards(str(train.folder), str(val.folder.parent)).eval.folder == val.folder


def test_evaluation_alone_needs_no_training_shards(make_shards: Make, tmp_path: Path) -> None:
    val = make_shards([2], "val")
    assert resolve_shards(None, str(val.folder)).train is None
    found = resolve_shards(str(tmp_path / "absent"), str(val.folder), evaluate_only=True)
    assert found.train is None
    with pytest.raises(DataError, match="no such folder"):
        resolve_shards(str(tmp_path / "absent"), str(val.folder))


def test_a_pattern_takes_a_part_of_the_manifest(make_shards: Make) -> None:
    make_shards([2], "val")
    folder = make_shards([3, 2, 4]).folder
    found = resolve_shards(f"{folder}/part{{0..1}}-000000.tar").train
    assert found is not None
    assert found.manifest.samples == 5
    assert found.manifest.class_counts == (2, 2, 1)  # of the chosen shards, not of all
    single = resolve_shards(f"{folder}/part2-000000.tar").train
    assert single is not None
    assert single.manifest.samples == 4


def test_patterns_need_the_manifest_that_index_makes(make_shards: Make) -> None:
    folder = make_shards([3, 2]).folder
    for path in folder.glob("*.json"):
        path.unlink()
    for path in folder.glob("*.npy"):
        path.unlink()
    pattern = f"{folder}/part{{0..1}}-000000.tar"
    with pytest.raises(DataError, match="prepare index"):
        resolve_shards(pattern, pattern)
    index_pattern(f"{folder}/part0-000000.tar")
    with pytest.raises(DataError, match=r"does not list part1-000000\.tar"):
        resolve_shards(pattern, pattern)
    made = index_pattern(pattern)
    assert made.class_names == ("0", "1", "2")
    assert resolve_shards(pattern, pattern).eval.manifest.samples == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent", "no such folder.*prepare SOURCE"),
        ("empty", "the folder is empty"),
        ("full", r"no manifest\.json.*prepare index"),
        ("{a,b}/x.tar", "one folder"),
        ("x-{0,0}.tar", "twice"),
    ],
)
def test_what_is_not_there(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something.txt").write_text("")
    with pytest.raises(DataError, match=f"(?s){message}"):
        resolve_shards(str(tmp_path / text))


def test_no_evaluation_shards(make_shards: Make) -> None:
    with pytest.raises(DataError, match=r"data\.eval_shards"):
        resolve_shards(str(make_shards([3]).folder))
    with pytest.raises(DataError, match=r"data\.shards is not set"):
        resolve_shards(None)


def test_classes_must_agree(make_shards: Make) -> None:
    train, val = make_shards([3]), make_shards([3], "val")
    val.manifest.model_copy(update={"class_names": ("a", "x", "c")}).write(val.folder)
    with pytest.raises(DataError, match=r"label 1 is 'b' in .* and 'x'"):
        resolve_shards(str(train.folder))
    val.manifest.model_copy(update={"class_names": ("a", "b"), "class_counts": (1, 1)}).write(val.folder)
    assert resolve_shards(str(train.folder)).eval.manifest.class_names == ("a", "b")


def test_sizes_are_compared_with_the_manifest(make_shards: Make) -> None:
    shards = make_shards([3, 2, 2])
    shards.check()
    os.truncate(shards.path(0), 1000)
    shards.path(1).write_bytes(shards.path(1).read_bytes() + b"\0")
    shards.path(2).unlink()
    with pytest.raises(
        DataError, match=r"(?s)part0-000000.tar is truncated: 1,000 bytes.*part1.*not the one.*part2.*not there"
    ):
        shards.check()
