"""Folders that DeepSpeed itself writes, made by a real engine in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vit_efficient.engine.consolidate import consolidate
from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.zero_folder import is_zero_folder

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
MAKE = """
import importlib, sys, torch
from torch import nn
import deepspeed
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
deepspeed.init_distributed(dist_backend="gloo")
module = nn.Module()
module.model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
module.forward = lambda images: module.model(images)
optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": int(sys.argv[1])}}
engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
for _ in range(2):
    engine.backward(engine(torch.randn(4, 5)).square().mean())
    engine.step()
engine.save_checkpoint("folder", tag="here")
with deepspeed.zero.GatheredParameters(list(module.parameters())):
    torch.save({name: tensor.clone() for name, tensor in module.model.state_dict().items()}, "whole.pt")
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_of_such_a_folder(tmp_path: Path, stage: int) -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    made = subprocess.run(
        [sys.executable, "-c", MAKE, str(stage)],
        cwd=tmp_path,
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    folder, out = tmp_path / "folder", tmp_path / "weights.safetensors"
    assert is_zero_folder(folder)
    with pytest.raises(CheckpointError, match="--trust"):
        consolidate(str(folder), out)
    assert not out.exists()
    written = consolidate(str(folder), out, trust=True)
    assert written.step == 2
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    found = load_file(out)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name].to(whole[name].dtype), whole[name]) for name in whole)
    next((folder / "here").glob("*_optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="missing or damaged"):
        consolidate(str(folder), tmp_path / "other.safetensors", trust=True)


def test_other_folders_are_none(tmp_path: Path) -> None:
    assert not is_zero_folder(tmp_path)
    (tmp_path / "latest").write_text("gone")
    assert not is_zero_folder(tmp_path)
