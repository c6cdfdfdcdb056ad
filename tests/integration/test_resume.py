"""A run that is stopped or killed anywhere goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vit_efficient.engine.checkpoint import read_checkpoint

Start = Callable[..., subprocess.Popen[str]]
Command = Callable[..., str]
Send = Callable[[subprocess.Popen[str], signal.Signals], None]


def lines(audit: Path) -> list[tuple[int, int, str]]:
    """(epoch, step, key) of every sample, in the order they were consumed."""
    text = audit.read_text()
    rows = [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]  # a kill may leave half a line
    return [(int(epoch), int(step), key) for epoch, step, _, key in rows]


def flat(tree: Any, name: str) -> dict[str, Any]:
    """Every leaf of nested mappings and lists, by its path."""
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for key, value in enumerate(tree) for k, v in flat(value, f"{name}.{key}").items()}
    return {name: tree}


def final_state(run: Path) -> dict[str, Any]:
    """All of a run's last checkpoint, by name: weights, average, optimizer, schedule, loops, place, history.

    Left out is what must differ: how long it took, and the recipe with the names of folders.
    """
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    for name in ("clock", "recipe"):
        del checkpoint["vit_efficient"][name]
    return flat(checkpoint, "checkpoint")


def differ(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype != b.dtype or not torch.equal(a, b)
    return bool(a != b)


def assert_same(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    assert first.keys() == second.keys()
    assert [name for name in first if differ(first[name], second[name])] == []
    parts = {name.split(".")[1] for name in first}
    assert {"state_dict", "average", "optimizer_states", "lr_schedulers", "loops", "vit_efficient"} <= parts


def assert_same_random(straight: Path, resumed: Path) -> None:
    """After every step, whenever it was run, the generators stood where they stood in the uninterrupted run."""
    expected, seen = ([line.split() for line in path.read_text().splitlines()] for path in (straight, resumed))
    table = dict(expected)
    assert len(table) == len({state for _, state in expected}) == 36
    assert {step for step, _ in seen} == table.keys()
    assert [step for step, state in seen if table[step] != state] == []


RECIPE = ("--recipe", "int8_sdpa", "run.log_every=5", "model.kwargs.drop_path_rate=0.1")
EVERY = "checkpoint.every_steps=1"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path, small: Sequence[str]) -> Path:
    """The same run, never interrupted; its audit file lies beside it."""
    folder = tmp_path_factory.mktemp("straight")
    environment = {**os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    words = [*RECIPE, *small, "run.dir=straight", "data.audit=straight.txt"]
    done = subprocess.run(
        [sys.executable, "-m", "vit_efficient.fit", *words],
        cwd=folder, env=environment, text=True, capture_output=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "straight"


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
@pytest.mark.parametrize("kills", [[25], pytest.param(10, marks=pytest.mark.long)], ids=["new epoch", "10"])
def test_killed(
    start_with: Start, command: Command, small: Sequence[str], straight: Path, tmp_path: Path, kills: int | list[int]
) -> None:
    """`kill -9` at random steps of 36, and in the first one of an epoch, so that the run goes on from between two.

    The last result of ten is in docs/faults.md.
    """
    steps = kills if isinstance(kills, list) else sorted(random.SystemRandom().sample(range(1, 36), kills))
    print("killed after steps", steps)
    words = (*RECIPE, *small, EVERY, "run.dir=killed", "data.audit=killed.txt", "--resume", "auto")
    for step in steps:
        process = start_with(f"kill:{step}", *words)
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL, printed
    command("fit", *words, "data.workers=0")  # the number of workers is free
    check_samples(straight.with_name("straight.txt"), tmp_path / "killed.txt")
    assert_same(straight, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, pytest.param(12, marks=pytest.mark.long), 24])  # 12 and 24 end an epoch
def test_interrupted(
    start_with: Start,
    signal_stopped: Send,
    command: Command,
    small: Sequence[str],
    straight: Path,
    tmp_path: Path,
    steps_shown: Callable[[Path], list[int]],
    step: int,
) -> None:
    words = (*RECIPE, *small, "run.dir=stopped", "data.audit=stopped.txt")
    process = start_with(f"stop:{step}", *words)
    signal_stopped(process, signal.SIGINT)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 130, printed
    assert "--resume stopped" in printed
    assert steps_shown(tmp_path / "stopped") == list(range(5, step + 1, 5))  # the one that it was stopped after too
    command("fit", "--resume", "stopped")  # the words that were printed: the run's own recipe serves
    check_samples(straight.with_name("straight.txt"), tmp_path / "stopped.txt")
    assert_same(straight, tmp_path / "stopped")
    assert len([*(tmp_path / "stopped" / "checkpoints").glob("step-*.ckpt")]) == 2


@pytest.mark.slow
def test_resumed_with_accumulation(
    start_with: Start,
    signal_stopped: Send,
    command: Command,
    small: Sequence[str],
    straight: Path,
    tmp_path: Path,
) -> None:
    """Another micro-batch continues with the same samples in each global batch."""
    words = (*RECIPE, *small, "run.dir=other", "data.audit=other.txt")
    process = start_with("stop:17", *words)
    signal_stopped(process, signal.SIGTERM)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, printed
    command("fit", "--resume", "other", "strategy.micro_batch=32")
    expected, seen = (set(lines(path)) for path in (straight.with_name("straight.txt"), tmp_path / "other.txt"))
    assert seen == expected
    assert len(lines(tmp_path / "other.txt")) == len(expected)


RANGES = (
    "--recipe", "int8_sdpa", "quantization.activations=static", "quantization.attention=static",
    "quantization.weight_bits=4", "quantization.learn_scales=true", "quantization.freeze_ranges=0.3",
    "quantization.calibration={samples: 48}", "data.workers=0",
)  # fmt: skip
QLORA = ("--recipe", "int4_sdpa", "quantization.lora.dropout=0.1", "data.workers=0")
ONE_GPU = ("strategy=single", "strategy.accelerator=gpu", "run.deterministic=true")  # of several too


def compare_with_kills(start_with: Start, words: tuple[str, ...], tmp_path: Path, kills: int) -> None:
    """One run uninterrupted and one killed at random steps, resumed each time: the same in everything."""
    process = start_with("random", *words, "run.dir=straight", "data.audit=straight.txt")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    (tmp_path / "random.txt").rename(tmp_path / "straight-random.txt")
    steps = sorted(random.SystemRandom().sample(range(1, 36), kills))
    print("killed after steps", steps)
    again = (*words, EVERY, "run.dir=killed", "data.audit=killed.txt", "--resume", "auto")
    for step in steps:
        process = start_with(f"random+kill:{step}", *again)
        printed, _ = process.communicate(timeout=400)
        assert process.returncode == -signal.SIGKILL, printed
    process = start_with("random", *again)
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    check_samples(tmp_path / "straight.txt", tmp_path / "killed.txt")
    assert_same_random(tmp_path / "straight-random.txt", tmp_path / "random.txt")
    assert_same(tmp_path / "straight", tmp_path / "killed")


@pytest.mark.slow
def test_killed_with_every_generator_watched(start_with: Start, small: Sequence[str], tmp_path: Path) -> None:
    compare_with_kills(start_with, (*RECIPE, *small, "data.workers=0"), tmp_path, kills=3)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("recipe", [RANGES, QLORA], ids=["learned ranges", "QLoRA"])
@pytest.mark.parametrize(
    "where",
    [(), pytest.param(ONE_GPU, marks=pytest.mark.gpu)],
    ids=["cpu", "gpu"],
)
def test_killed_in_other_kinds_of_training(
    start_with: Start,
    command: Command,
    small: Sequence[str],
    tmp_path: Path,
    recipe: tuple[str, ...],
    where: tuple[str, ...],
) -> None:
    """Weights, ranges or adapters, average, optimizer, schedule, generators and samples, to the last bit."""
    words = (*recipe, *small, *where)
    if recipe is QLORA:  # its base first, which is not what is looked at here
        command("fit", "--recipe", "fp32_sdpa", *small, *where, "run.dir=base")
        words = (*words, "quantization.base=base/model.safetensors")
    compare_with_kills(start_with, words, tmp_path, kills=3)


@pytest.mark.gpu
@pytest.mark.slow
def test_killed_on_a_gpu(start_with: Start, small: Sequence[str], tmp_path: Path) -> None:
    """With deterministic algorithms int8 goes on there as on a CPU."""
    words = (*RECIPE, *small, *ONE_GPU, "data.workers=0")
    compare_with_kills(start_with, words, tmp_path, kills=3)
