from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_efficient.data.indexing import index_pattern
from vit_efficient.data.manifest import Manifest
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.verify import verify_folder
from vit_efficient.errors import DataError


@pytest.fixture
def others(make_shards: Callable[..., ShardSet]) -> tuple[Path, Manifest, dict[str, bytes]]:
    """Nine shards without manifest and indices, and what those were."""
    made = make_shards([2, 1, 3, 1, 1, 2, 1, 1, 4])
    folder = made.folder
    assert isinstance(folder, Path)
    indices = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    for path in [*folder.glob("*.npy"), folder / "manifest.json"]:
        path.unlink()
    return folder, made.manifest, indices


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_found_is_what_was_written(others: tuple[Path, Manifest, dict[str, bytes]], processes: int) -> None:
    folder, before, indices = others
    told: list[tuple[str, int, int, int]] = []

    def progress(part: str, done: int, total: int, volume: int = 0) -> None:
        told.append((part, done, total, volume))

    made = index_pattern(f"{folder}/part{{0..8}}-000000.tar", ("a", "b", "c"), progress, processes)
    assert (made.shards, made.class_counts, made.samples) == (before.shards, before.class_counts, 16)
    assert {path.name: path.read_bytes() for path in folder.glob("*.npy")} == indices
    assert not list(verify_folder(folder, progress))
    assert [what[:3] for what in told[:10]] == [("index", done, 9) for done in range(10)]
    assert told[9][3] == sum(entry.bytes for entry in before.shards)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_shard_stops_it_before_there_is_a_manifest(
    others: tuple[Path, Manifest, dict[str, bytes]], processes: int
) -> None:
    folder, _, _ = others
    os.truncate(folder / "part3-000000.tar", 700)
    with pytest.raises(DataError, match="part3-000000"):
        index_pattern(f"{folder}/part{{0..8}}-000000.tar", processes=processes)
    assert not (folder / "manifest.json").exists()
    assert not multiprocessing.active_children()
