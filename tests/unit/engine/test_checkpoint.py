"""Checkpoints are whole or absent, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from vit_efficient.engine.checkpoint import (
    AtomicCheckpointIO,
    atomic_write,
    drop_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from vit_efficient.engine.rundir import RunDir, locate, write_json
from vit_efficient.errors import CheckpointError, UserError

WHOLE = {"vit_efficient": {"format": 1}, "state_dict": {"w": torch.arange(4.0)}}


class Hostile:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_round_trip(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(WHOLE, tmp_path / "step-00000001.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "step-00000001.ckpt")["state_dict"]["w"], torch.arange(4.0))


def test_hostile_checkpoint_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save({"vit_efficient": Hostile(trap)}, tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Hostile(trap)))
    for name in ("a.ckpt", "b.ckpt"):
        with pytest.raises(CheckpointError, match="never run"):
            read_checkpoint(tmp_path / name)
        with pytest.raises(CheckpointError):
            AtomicCheckpointIO().load_checkpoint(tmp_path / name, weights_only=False)
    assert not trap.exists()
    pickle.loads((tmp_path / "b.ckpt").read_bytes())
    assert trap.exists()


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save(WHOLE, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match=r"model\.weights="):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_newest_is_by_step_not_by_time(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        (tmp_path / f"step-{step:08d}.ckpt").touch()
    (tmp_path / "step-xyz.ckpt").touch()
    (tmp_path / ".step-00000999.ckpt.7.tmp").touch()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000100.ckpt"


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.check_new()
    run.create()
    with pytest.raises(UserError, match="--resume"):
        run.check_new()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="already exists"):
        RunDir(tmp_path / "file").check_new(again=True)


def test_a_run_without_checkpoint_may_begin_again_and_nothing_else(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.create()
    run.recipe.touch()
    run.check_new(again=True)
    for name in ("checkpoints/step-00000001.ckpt", "holiday.jpg"):
        (run.path / name).touch()
        with pytest.raises(UserError, match="already exists"):
            run.check_new(again=True)
        (run.path / name).unlink()


def test_half_written_files_are_cleared(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.create()
    half = run.checkpoints / ".step-00000001.ckpt.77.tmp"
    half.touch()
    run.create()
    assert not half.exists()


def test_resume_targets(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "r")
    run.create()
    with pytest.raises(CheckpointError, match="nothing was saved"):
        locate(str(run.path))
    (run.checkpoints / "step-00000003.ckpt").touch()
    assert locate(str(run.path))[1].name == "step-00000003.ckpt"
    assert locate(str(run.checkpoints / "step-00000003.ckpt"))[0].path == run.path
    with pytest.raises(CheckpointError, match="no such"):
        locate(str(tmp_path / "nowhere"))
    (tmp_path / "loose.ckpt").touch()
    with pytest.raises(CheckpointError, match="rest of its run"):
        locate(str(tmp_path / "loose.ckpt"))


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": [1.5, float("nan")]})
    assert (tmp_path / "m.json").read_text() == '{\n  "a": null,\n  "b": [\n    1.5,\n    null\n  ]\n}\n'


def test_only_what_came_before_counts_for_keep(tmp_path: Path) -> None:
    """A run that went on from step 10 has later files of the run before: they must not push out what is new."""
    for step in (5, 10, 15, 40, 50):
        (tmp_path / f"step-{step:08d}.ckpt").write_bytes(b"x")
    drop_checkpoints(tmp_path / "step-00000015.ckpt", 2)
    assert sorted(int(path.stem[5:]) for path in tmp_path.iterdir()) == [10, 15, 40, 50]
