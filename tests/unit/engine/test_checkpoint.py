"""Checkpoints are whole or absent, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from vit_efficient.engine.checkpoint import (
    AtomicCheckpointIO,
    atomic_write,
    drop_checkpoints,
    name_checkpoint,
    newest_checkpoint,
    read_checkpoint,
)
from vit_efficient.engine.rundir import RunDir, find_unfinished, locate, run_stem, write_json
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.parallel.sums import REST
from vit_efficient.recipe.load import dump_recipe, load_recipe

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


def test_a_folder_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    """A process that is killed while it puts one checkpoint in the place of another loses neither."""
    run = RunDir(tmp_path / "r")
    run.create()
    for name in (".step-00000001.ckpt.old.tmp", ".step-00000002.ckpt.old.tmp", "step-00000002.ckpt"):
        (run.checkpoints / name).mkdir()
    run.create()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-00000001.ckpt", "step-00000002.ckpt"]


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    """A run that went on from an earlier step without `checkpoint.sharded` meets the folders of later ones."""
    path = tmp_path / "step-00000001.ckpt"
    path.mkdir()
    (path / REST).touch()
    AtomicCheckpointIO().save_checkpoint(WHOLE, path)
    assert torch.equal(read_checkpoint(path)["state_dict"]["w"], torch.arange(4.0))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    other = tmp_path / "photos"
    other.mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(other, {})
    assert other.is_dir()


def test_no_room_for_a_file_or_a_name(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint(WHOLE, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"a full disk.*bytes free"):
            AtomicCheckpointIO().save_checkpoint(WHOLE, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.raises(CheckpointError, match=r"Cannot write the checkpoint .*last\.ckpt"):
        name_checkpoint(tmp_path / "absent.ckpt", tmp_path / "last.ckpt")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    read_checkpoint(path)


def test_the_newest_run_is_the_one_that_began_last(tmp_path: Path) -> None:
    """Whatever its name ends in: a time, or the number of a job."""
    recipe = load_recipe("fp32_sdpa").recipe
    for age, end in enumerate(("1000", "20260101-101010", "99")):  # the last is the oldest, and the first by name
        run = RunDir(tmp_path / f"{run_stem(recipe.variant, recipe.protocol)}-{end}")
        run.create()
        run.recipe.write_text(dump_recipe(recipe))
        (run.checkpoints / "step-00000001.ckpt").touch()
        began = 1_700_000_000 - 60 * age
        os.utime(run.recipe, (began, began))
    found = find_unfinished(recipe, tmp_path)
    assert found is not None
    assert found.path.name.endswith("-1000")
    found.metrics.touch()
    found = find_unfinished(recipe, tmp_path)
    assert found is not None
    assert found.path.name.endswith("-20260101-101010")


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
