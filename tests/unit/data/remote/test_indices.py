"""Offset indices of remote shards: fetched once for a machine, and never believed blindly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_efficient.data.reader import ShardReader
from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.resolve import open_shards
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shards import index_path, read_index
from vit_efficient.errors import DataError

pytestmark = pytest.mark.timeout(60)
INDEX = "train/part0-000000.idx.npy"


@pytest.fixture
def made(make_shards: Callable[..., ShardSet]) -> ShardSet:
    return make_shards([5, 3, 6])


@pytest.fixture
def remote(made: ShardSet, server: Any) -> Callable[..., ShardSet]:
    def open_set(cache: Path | None = None, files: str = "") -> ShardSet:
        config = RemoteConfig(timeout=2.0, attempts=2, cache=cache)
        return open_shards(f"{server.url}/train{files}", "data.shards", "train", config)

    return open_set


@pytest.mark.parametrize("cached", [False, True])
def test_an_index_is_fetched_once_and_mapped(
    made: ShardSet, remote: Callable[..., ShardSet], server: Any, tmp_path: Path, cached: bool
) -> None:
    shards = remote(tmp_path / "cache" if cached else None)
    with ShardReader(shards, 3, open_files=1) as reader:
        for number in (0, 1, 0, 2, 0):
            reader.read(number, 0)
    found = remote(tmp_path / "cache" if cached else None).index(0)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, read_index(made.path(0), 5))
    assert [server.count(f"train/part{number}-000000.idx.npy") for number in range(3)] == [1, 1, 1]
    kept = tmp_path / ("cache" if cached else "own") / "indices"
    assert {path.name for path in kept.iterdir()} == {
        f"{entry.sha256}.idx.npy" for entry in made.manifest.shards
    }  # and nothing half written


def test_a_kept_index_that_is_damaged_is_fetched_again(
    made: ShardSet, remote: Callable[..., ShardSet], server: Any, tmp_path: Path
) -> None:
    remote().index(0)
    (kept,) = (tmp_path / "own" / "indices").iterdir()
    for damage in (b"", kept.read_bytes()[:-30], index_path(made.path(1)).read_bytes()):
        kept.write_bytes(damage)
        np.testing.assert_array_equal(remote().index(0), read_index(made.path(0), 5))
    assert server.count(INDEX) == 4


@pytest.mark.parametrize("wrong", ["another shard's", "cut", "longer than the shard"])
def test_an_index_that_is_not_the_shards_is_an_error_and_not_kept(
    made: ShardSet, remote: Callable[..., ShardSet], server: Any, tmp_path: Path, wrong: str
) -> None:
    path = index_path(made.path(0))
    if wrong == "another shard's":
        path.write_bytes(index_path(made.path(1)).read_bytes())
    elif wrong == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        index = np.load(path)
        index["offset"] += 1 << 20
        np.save(path, index)
    with pytest.raises(DataError, match=r"offset index http://.*/part0-000000\.idx\.npy (does not|cannot be read)"):
        remote().index(0)
    assert not list((tmp_path / "own").glob("indices/*"))


def test_a_part_of_the_shards_is_counted_without_fetching_any(
    remote: Callable[..., ShardSet], server: Any, tmp_path: Path
) -> None:
    shards = remote(tmp_path / "cache", "/part{0..1}-000000.tar")
    assert shards.manifest.class_counts == (3, 3, 2)
    assert not any(file.endswith(".tar") for _, file, _ in server.requests)


def test_a_pattern_gives_the_same_order_as_it_does_locally(made: ShardSet, remote: Callable[..., ShardSet]) -> None:
    pattern = "/part{2,0,1}-000000.tar"
    local = open_shards(f"{made.folder}{pattern}", "data.shards", "train")
    assert [entry.samples for entry in local.manifest.shards] == [6, 5, 3]
    assert remote(None, pattern).manifest == local.manifest
