"""A damaged checkpoint is noticed, and the one before it found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vit_efficient.engine.checkpoint import read_checkpoint
from vit_efficient.engine.integrity import candidates, damage, newest_whole
from vit_efficient.errors import CheckpointError

WEIGHTS = {"vit_efficient": {"format": 1}, "state_dict": {"w": torch.arange(40_000.0)}}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[int], Path]:
    def save(step: int) -> Path:
        path = tmp_path / f"step-{step:08d}.ckpt"
        torch.save(WEIGHTS, path)
        return path

    return save


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_that_torch_does_not_see(saved: Callable[[int], Path]) -> None:
    path = saved(1)
    assert damage(path) is None
    flip(path, path.stat().st_size // 2)
    loaded = torch.load(path, weights_only=True)["state_dict"]["w"]
    assert not torch.equal(loaded, WEIGHTS["state_dict"]["w"])
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 1, 1000, 100_000])
def test_truncated(saved: Callable[[int], Path], keep: int) -> None:
    path = saved(1)
    os.truncate(path, keep)
    assert damage(path) is not None


@pytest.mark.parametrize("seed", range(20))
def test_damage_never_raises(saved: Callable[[int], Path], seed: int) -> None:
    """Bytes of the archive's own structure, too: whatever is wrong is said, not raised."""
    path = saved(1)
    place = torch.Generator().manual_seed(seed)
    size = path.stat().st_size
    for _ in range(20):
        flip(path, size - 1 - int(torch.randint(0, 1200, (1,), generator=place)))
    damage(path)


def test_the_newest_whole_one(saved: Callable[[int], Path], tmp_path: Path) -> None:
    paths = [saved(step) for step in (9, 10, 11)]
    assert newest_whole(tmp_path) == (paths[2], [])
    os.truncate(paths[2], 5000)
    flip(paths[1], paths[1].stat().st_size // 2)
    found, refused = newest_whole(tmp_path)
    assert found == paths[0]
    assert [line.split()[0] for line in refused] == [str(paths[2]), str(paths[1])]
    os.truncate(paths[0], 5000)
    with pytest.raises(CheckpointError, match=r"(?s)Every checkpoint.*step-00000009"):
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "nowhere") == (None, [])


def test_a_folder_without_its_parts_is_no_way_out(saved: Callable[[int], Path], tmp_path: Path) -> None:
    """`rm` may have been killed in the middle of one."""
    path = saved(3)
    left = tmp_path / "step-00000004.ckpt"
    left.mkdir()
    found, (line,) = newest_whole(tmp_path)
    assert found == path
    assert line == f"{left} is damaged: rest.pt is missing"


def test_other_names_of_a_file_are_no_way_out(saved: Callable[[int], Path], tmp_path: Path) -> None:
    path = saved(3)
    os.link(path, tmp_path / "last.ckpt")
    torch.save(WEIGHTS, tmp_path / "best.ckpt")
    (tmp_path / ".step-00000004.ckpt.1.tmp").touch()
    assert [p.name for p in candidates(tmp_path)] == ["step-00000003.ckpt", "best.ckpt"]
