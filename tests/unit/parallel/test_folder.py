"""Checkpoints in parts: read as they were written, damaged and hostile ones refused."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.folder import INDEX, REST, has_parts, is_folder, read_folder, write_folder


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


def test_written_again_in_its_place(folder: Path, weight: DTensor) -> None:
    write_folder(folder, checkpoint(weight + 1))
    assert torch.equal(read_folder(folder)["state_dict"]["w"], torch.arange(1.0, 13).view(4, 3))


def truncate(folder: Path) -> None:
    part = next(folder.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def lose(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def garble(folder: Path) -> None:
    (folder / INDEX).write_bytes(b"\x80\x04garbage")


@pytest.mark.parametrize("harm", [truncate, lose, garble])
def test_damage_is_a_checkpoint_error(folder: Path, harm: Callable[[Path], None]) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match="Cannot read the checkpoint"):
        read_folder(folder)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("name", [INDEX, REST])
def test_code_in_a_folder_does_not_run(
    folder: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
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


def test_half_written_is_no_checkpoint(folder: Path) -> None:
    (folder / REST).unlink()
    assert not is_folder(folder)
