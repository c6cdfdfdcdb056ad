"""Checkpoints in parts: read as they were written, damaged and hostile ones refused."""

from __future__ import annotations

import os
import pathlib
import pickle
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.folder import has_parts, is_folder, read_folder, write_folder
from vit_efficient.parallel.index import INDEX
from vit_efficient.parallel.sums import REST, folder_damage


@pytest.fixture
def weight(mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(torch.arange(12.0).view(4, 3), mesh)


@pytest.fixture
def folder(tmp_path: Path, weight: DTensor) -> Path:
    path = tmp_path / "step-00000001.ckpt"
    write_folder(path, checkpoint(weight))
    return path


def checkpoint(weight: DTensor) -> dict[str, Any]:
    states = [{"state": {"w": {"exp_avg": weight * 2, "step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1}]}]
    return {"state_dict": {"w": weight}, "optimizer_states": states, "place": {"epoch": 3, "none": None}}


def test_whole_or_in_parts(folder: Path, weight: DTensor) -> None:
    assert is_folder(folder)
    assert [p.name for p in folder.parent.glob(".*.tmp")] == []
    whole = read_folder(folder)
    assert whole["place"] == {"epoch": 3, "none": None}
    assert not has_parts(whole)
    state = whole["optimizer_states"][0]
    assert state["param_groups"] == [{"lr": 0.1}]
    assert state["state"]["w"]["step"] == 7
    assert torch.equal(state["state"]["w"]["exp_avg"], torch.arange(12.0).view(4, 3) * 2)
    parts = read_folder(folder, {"w": nn.Parameter(weight)})
    moment = parts["optimizer_states"][0]["state"]["w"]["exp_avg"]
    assert isinstance(moment, DTensor)
    assert torch.equal(moment.full_tensor(), weight.full_tensor() * 2)
    assert not isinstance(parts["optimizer_states"][0]["state"]["w"]["step"], DTensor)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_written_by_another_python(
    tmp_path: Path, weight: DTensor, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index holds a path, whose class Python 3.13 knows under another name than those before and after it."""
    path = tmp_path / "step-00000001.ckpt"
    with monkeypatch.context() as other:
        other.setitem(sys.modules, module, pathlib)
        other.setattr(pathlib.PosixPath, "__module__", module)
        write_folder(path, checkpoint(weight))
    assert (b"pathlib._local" in (path / INDEX).read_bytes()) == (module == "pathlib._local")
    assert torch.equal(read_folder(path)["state_dict"]["w"], weight.full_tensor())


def test_written_again_in_its_place(folder: Path, weight: DTensor) -> None:
    write_folder(folder, checkpoint(weight + 1))
    assert torch.equal(read_folder(folder)["state_dict"]["w"], torch.arange(1.0, 13).view(4, 3))


def truncate(folder: Path) -> None:
    part = next(folder.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def lose(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def lose_rest(folder: Path) -> None:
    (folder / REST).unlink()


def garble(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\x80\x04garbage")


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def flip_weight(folder: Path) -> None:
    """One bit of one number, wherever in its part that lies."""
    part = next(folder.glob("*.distcp"))
    flip(part, part.read_bytes().index(torch.arange(12.0).numpy().tobytes()) + 5)


def flip_rest(folder: Path) -> None:
    flip(folder / REST, (folder / REST).read_bytes().index(b"param_groups"))


HARMS: dict[Callable[[Path], None], str] = {
    truncate: "bytes of", lose: "distcp is missing", lose_rest: f"{REST} is missing", garble: f"the part {INDEX} has",
    flip_weight: "distcp do not have the checksum", flip_rest: f"{REST}: ",
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_a_checkpoint_error(folder: Path, harm: Callable[[Path], None]) -> None:
    assert folder_damage(folder) is None
    harm(folder)
    assert HARMS[harm] in (folder_damage(folder) or "none")
    assert is_folder(folder)  # what is damaged is still a checkpoint, not some folder
    with pytest.raises(CheckpointError, match=r"Cannot read the checkpoint(?s:.*)It is damaged"):
        read_folder(folder)


def age(folder: Path) -> None:
    """Make it a folder of the version that listed no checksums."""
    rest = torch.load(folder / REST, weights_only=True)
    del rest["files"]
    torch.save(rest, folder / REST)


def test_folders_without_checksums(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They load, with a line; what their index knows, the sizes, is checked."""
    age(folder)
    for _ in range(3):
        assert torch.equal(read_folder(folder)["state_dict"]["w"], torch.arange(12.0).view(4, 3))
    (line,) = [each.message for each in caplog.records if each.name.startswith("vit_efficient")]
    assert "step-00000001.ckpt was written without checksums" in line
    flip_weight(folder)
    assert not torch.equal(read_folder(folder)["state_dict"]["w"], torch.arange(12.0).view(4, 3))  # DCP does not look
    for harm in (truncate, lose):
        harm(folder)
        with pytest.raises(CheckpointError, match=HARMS[harm]):
            read_folder(folder)


def test_what_another_program_put_there(folder: Path) -> None:
    torch.save(["anything"], folder / REST)
    assert folder_damage(folder) is not None
    torch.save({"tree": {}, "places": [], "files": {"a": 1}}, folder / REST)
    assert folder_damage(folder) is not None


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to a process, here by the kernel's limit on the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("where", ["a part", "the rest"])
def test_no_room(folder: Path, weight: DTensor, where: str) -> None:
    """The cause is named, nothing half is left, and what was there before is whole."""
    large = checkpoint(weight)
    if where == "the rest":
        large["place"]["names"] = "x" * 100_000
    with (
        files_of_at_most(1_000 if where == "a part" else 50_000),
        pytest.raises(
            CheckpointError, match=r"Cannot write .*File too large.*\(process 0\)\. There are [\d,]+ bytes free"
        ),
    ):
        write_folder(folder, large)
    assert [path.name for path in folder.parent.iterdir() if path.name != "meeting"] == [folder.name]
    assert torch.equal(read_folder(folder)["state_dict"]["w"], torch.arange(12.0).view(4, 3))
    write_folder(folder, large)


def test_no_folder_can_be_made(tmp_path: Path, weight: DTensor) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"Cannot write the checkpoint .*Not a directory"):
        write_folder(tmp_path / "file" / "step-00000001.ckpt", checkpoint(weight))


def test_in_place_of_a_file(tmp_path: Path, weight: DTensor) -> None:
    """A run that went on from an earlier step with `checkpoint.sharded` meets the files of later ones."""
    path = tmp_path / "step-00000001.ckpt"
    path.write_text("of a run that wrote files")
    write_folder(path, checkpoint(weight))
    assert folder_damage(path) is None
    assert not list(tmp_path.glob(".*"))


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", [INDEX, REST])
def test_code_in_a_folder_does_not_run(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    age(folder)  # whoever can write an index can write its checksum as well
    if name == REST:
        torch.save(Evil(), folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        read_folder(folder)
    assert not (tmp_path / "ran").exists()
    if name == INDEX:
        with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
            read_folder(folder)
