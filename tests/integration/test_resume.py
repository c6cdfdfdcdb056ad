"""A run that is stopped or killed anywhere goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from vit_efficient.engine.checkpoint import read_checkpoint

Start = Callable[..., subprocess.Popen[str]]
Command = Callable[..., str]


def lines(audit: Path) -> list[tuple[int, int, str]]:
    """(epoch, step, key) of every sample, in the order they were consumed."""
    rows = [line.split() for line in audit.read_text().splitlines()] if audit.exists() else []
    return [(int(epoch), int(step), key) for epoch, step, _, key in rows]


def wait_for_step(process: subprocess.Popen[str], audit: Path, step: int) -> None:
    """Wait until the run has consumed ``step`` optimizer steps in all."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len({(e, s) for e, s, _ in lines(audit)}) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run never reached step {step}: {process.communicate()[0]}")


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, average and optimizer moments of a run's last checkpoint, by name."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    state = {f"weight {k}": v for k, v in checkpoint["state_dict"].items()}
    state |= {f"average {k}": v for k, v in checkpoint["average"]["average"].items()}
    for number, moments in checkpoint["optimizer_states"][0]["state"].items():
        state |= {f"moment {number} {k}": v for k, v in moments.items() if isinstance(v, torch.Tensor)}
    return state


def assert_same(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


RECIPE = ("--recipe", "int8_sdpa", "run.log_every=5", "model.kwargs.drop_path_rate=0.1")
EVERY = "checkpoint.every_steps=1"


@pytest.fixture
def straight(command: Command, small: Sequence[str], tmp_path: Path) -> Path:
    """The same run, never interrupted."""
    command("fit", *RECIPE, *small, "run.dir=straight", "data.audit=straight.txt")
    return tmp_path / "straight"


def check_samples(straight: Path, resumed: Path) -> None:
    """Every step's samples, whenever it was run, are those of the uninterrupted run, in the same order."""

    def by_step(path: Path) -> dict[tuple[int, int], list[str]]:
        table: dict[tuple[int, int], list[str]] = {}
        for epoch, step, key in lines(path):
            table.setdefault((epoch, step), []).append(key)
        return table

    expected, seen = by_step(straight), by_step(resumed)
    assert seen.keys() == expected.keys()
    for place, keys in seen.items():
        once = expected[place]
        assert keys == once * (len(keys) // len(once)), place  # a step that was lost with a kill is run again


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 10])
def test_killed(
    start: Start, command: Command, small: Sequence[str], straight: Path, tmp_path: Path, kills: int
) -> None:
    """`kill -9` at random steps of 36; the last result of ten is in docs/data.md."""
    steps = sorted(random.SystemRandom().sample(range(1, 36), kills))
    print("killed after steps", steps)
    words = (*RECIPE, *small, EVERY, "run.dir=killed", "data.audit=killed.txt", "--resume", "auto")
    for step in steps:
        process = start("fit", *words)
        wait_for_step(process, tmp_path / "killed.txt", step)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    command("fit", *words, "data.workers=0")  # the number of workers is free
    check_samples(tmp_path / "straight.txt", tmp_path / "killed.txt")
    assert_same(straight, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 12, 24])  # inside an epoch, and at the ends of two
def test_interrupted(
    start: Start, command: Command, small: Sequence[str], straight: Path, tmp_path: Path, step: int
) -> None:
    words = (*RECIPE, *small, "run.dir=stopped", "data.audit=stopped.txt")
    process = start("fit", *words)
    wait_for_step(process, tmp_path / "stopped.txt", step)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 130, printed
    assert "--resume stopped" in printed
    command("fit", "--resume", "stopped")  # the words that were printed: the run's own recipe serves
    check_samples(tmp_path / "straight.txt", tmp_path / "stopped.txt")
    assert_same(straight, tmp_path / "stopped")
    assert len([*(tmp_path / "stopped" / "checkpoints").glob("step-*.ckpt")]) == 1


@pytest.mark.slow
def test_resumed_with_accumulation(
    start: Start, command: Command, small: Sequence[str], straight: Path, tmp_path: Path
) -> None:
    """Another micro-batch continues with the same samples in each global batch."""
    words = (*RECIPE, *small, "run.dir=other", "data.audit=other.txt")
    process = start("fit", *words)
    wait_for_step(process, tmp_path / "other.txt", 17)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM
    command("fit", "--resume", "other", "strategy.micro_batch=32")
    expected, seen = ({(e, s, k) for e, s, k in lines(tmp_path / f)} for f in ("straight.txt", "other.txt"))
    assert seen == expected
    assert len(lines(tmp_path / "other.txt")) == len(expected)
