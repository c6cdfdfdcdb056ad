"""`fit` with a teacher: a distilled run, what it leaves, and that it goes on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_efficient.engine.checkpoint import read_checkpoint

Command = Callable[..., str]
DISTILL = ("quantization.distill.teacher=teacher", "quantization.distill.alpha=0.7", "run.log_every=4")


def test_distilled_run(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    command("fit", "--recipe", "fp32_sdpa", *small, "run.dir=teacher")
    words = ("--recipe", "int8_sdpa", *small, *DISTILL, "checkpoint.every_steps=5", "checkpoint.keep=99")
    printed = command("fit", *words, "run.dir=run")
    assert "teacher/model.safetensors (sha256 " in printed
    assert "alpha 0.7, temperature 2" in printed

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    total, hard, soft = (
        [event.value for event in events.Scalars(f"train/{name}")] for name in ("loss", "loss_hard", "loss_soft")
    )
    assert len(total) == 9
    torch.testing.assert_close(torch.tensor(total), 0.3 * torch.tensor(hard) + 0.7 * torch.tensor(soft))

    whole = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    student = read_checkpoint(tmp_path / "teacher" / "checkpoints" / "last.ckpt")
    assert whole["state_dict"].keys() == student["state_dict"].keys()  # int8 layers keep their names
    assert whole["average"]["average"].keys() == student["average"]["average"].keys()
    assert whole["teacher"]["sha256"]

    # Killed after step 17 of 36, and continued.
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed" / "metrics.json").unlink()
    for path in (tmp_path / "killed" / "checkpoints").iterdir():
        if path.name != "step-00000017.ckpt":
            path.unlink()
    shutil.copytree(tmp_path / "killed", tmp_path / "changed")
    command("fit", *words, "run.dir=killed", "--resume", "killed")
    again = read_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, again["state_dict"][name]), name
    figures = [json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("run", "killed")]
    assert figures[0]["loss"] == figures[1]["loss"]

    # The figures of the shipped file need no teacher; going on does, and the same one.
    (tmp_path / "teacher" / "model.safetensors").unlink()  # what is found now is best.ckpt, another file
    printed = command("fit", *words, "run.dir=changed", "--resume", "changed", code=2)
    assert "quantization.distill.teacher" in printed
    assert "start afresh" in printed
    shutil.rmtree(tmp_path / "teacher")
    assert "there is no such file" in command("fit", *words, "run.dir=changed", "--resume", "changed", code=2)
    command("evaluate", "--checkpoint", "run", "--output", "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["loss"] == figures[0]["loss"]


def test_the_base_of_adapters_is_their_teacher(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    command("fit", "--recipe", "fp32_sdpa", *small, "run.dir=base")
    words = ("--recipe", "int4_sdpa", *small, "quantization.base=base", "quantization.distill={}")
    printed = command("fit", *words, "run.dir=run")
    assert "base/model.safetensors (sha256 " in printed


def test_without_a_trained_model_there_is_no_teacher(command: Command) -> None:
    for words in ((), ("--dry-run",)):
        code = 0 if words else 2
        printed = command("fit", "--recipe", "int8_sdpa", "quantization.distill={}", *words, code=code)
        assert "`model.weights` is unset, so there is no trained model in full precision" in " ".join(printed.split())
