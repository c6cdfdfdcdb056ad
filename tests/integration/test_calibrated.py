"""Runs with calibrated, learned ranges: resumed to the last bit, frozen at the end, evaluated without images, DDP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vit_efficient.engine.checkpoint import read_checkpoint

Command = Callable[..., str]
RECIPE = (
    "--recipe", "int8_sdpa", "quantization.activations=static", "quantization.attention=static",
    "quantization.weight_bits=4", "quantization.learn_scales=true", "quantization.freeze_ranges=0.3",
    "quantization.calibration={samples: 48}", "checkpoint.every_steps=1", "checkpoint.keep=100", "data.workers=0",
)  # fmt: skip
STEPS, LAST = 24, 17  # of 2 epochs; ranges move in the first 17 of them


def words(small: Sequence[str]) -> tuple[str, ...]:
    return (*RECIPE, *(word for word in small if not word.startswith("optim.epochs")), "optim.epochs=2")


def everything(run: Path) -> dict[str, Tensor]:
    """Weights, buffers, average and optimizer moments of a run's last checkpoint, by name."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    state = {f"weight {name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    state |= {f"average {name}": tensor for name, tensor in checkpoint["average"]["average"].items()}
    for number, moments in checkpoint["optimizer_states"][0]["state"].items():
        state |= {f"moment {number} {name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    return state


def ranges(run: Path, step: int) -> dict[str, Tensor]:
    state = read_checkpoint(run / "checkpoints" / f"step-{step:08d}.ckpt")["state_dict"]
    return {name: tensor for name, tensor in state.items() if ".log_" in name}


def test_a_run_and_its_second_half(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    printed = command("fit", *words(small), "run.dir=run")
    run = tmp_path / "run"
    assert "calibrated on 48 images" in printed
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == STEPS

    early, last, end = (ranges(run, step) for step in (LAST - 1, LAST, STEPS))
    assert len(early) == 2 * 8  # weights and inputs of two blocks' layers
    assert not any(torch.equal(early[name], last[name]) for name in early)
    assert all(torch.equal(last[name], end[name]) for name in end)

    half = tmp_path / "half"
    shutil.copytree(run, half)
    (half / "metrics.json").unlink()
    for later in (half / "checkpoints").iterdir():
        if later.name != "step-00000007.ckpt":
            later.unlink()
    printed = command("fit", "--resume", "half/checkpoints/step-00000007.ckpt")
    assert "calibration" not in printed  # the checkpoint has it all
    ours, theirs = everything(half), everything(run)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    model = next(word for word in small if word.startswith("model.kwargs"))
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    printed = command("evaluate", *RECIPE, model, "--checkpoint", checkpoint, "--output", "e.json")
    assert "calibrat" not in printed
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["top1"] == metrics["top1"]
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


@pytest.mark.slow
def test_two_ranks_are_one_run(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    """Each calibrates for itself; the losses are those of one process to float tolerance."""
    command("fit", *words(small), "run.dir=one")
    command(
        "fit", *words(small), "run.dir=two", "strategy=ddp", "strategy.devices=2", "strategy.accelerator=cpu"
    )  # fmt: skip
    one, two = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("one", "two"))
    assert [h["loss"] for h in two["history"]] == pytest.approx([h["loss"] for h in one["history"]], rel=5e-3)
    first, second = (ranges(tmp_path / folder, 1) for folder in ("one", "two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=2.5e-3)  # Adam's first step may go either way
