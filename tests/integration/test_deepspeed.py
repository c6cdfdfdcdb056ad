"""Two real DeepSpeed processes, on CPUs, train what one process does, and their checkpoints belong to every strategy.

`deepspeed_cpu.py` is the program. The shared run has three epochs of twelve steps, with several micro-batches in a step
and gradients that are clipped: a wrong division of the loss would show.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vit_efficient.engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
PROGRAM = str(Path(__file__).with_name("deepspeed_cpu.py"))
ZERO = ("strategy=deepspeed", "strategy.devices=2", "strategy.accelerator=cpu", "data.workers=0")
TRAINED = ("--recipe", "fp32_sdpa", "run.log_every=1", "optim.clip=0.5", "checkpoint.keep=9", "strategy.micro_batch=32")
DEPTH = "model.kwargs.drop_path_rate=0.3"  # the same samples leave out a branch, whoever has their micro-batch
MIDDLE = "step-00000024.ckpt"
Command = Callable[..., str]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are kept that several tests want."""
    return tmp_path_factory.mktemp("done")


@pytest.fixture
def trained(command: Command, small: Sequence[str], tmp_path: Path, done: Path) -> Callable[..., Path]:
    """A folder with the shared run, trained in one process (stage 0) or under DeepSpeed, once for all tests."""

    def run(name: str, stage: int, *more: str) -> Path:
        kept = done / "-".join((str(stage), *more))
        if not kept.exists():
            shutil.copytree(made(name, stage, *more), kept)
        elif not (tmp_path / name).exists():
            shutil.copytree(kept, tmp_path / name)
        return tmp_path / name

    def made(name: str, stage: int, *more: str) -> Path:
        words = (*TRAINED, *small, DEPTH, f"run.dir={name}")
        if stage:
            command(PROGRAM, *words, *ZERO, f"strategy.stage={stage}", *more)
        else:
            command("fit", *words, "data.workers=0")
        return tmp_path / name

    return run


def losses(run: Path) -> list[float]:
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 12 * len(metrics["history"])
    return [*(epoch["loss"] for epoch in metrics["history"]), metrics["loss"]]


def interrupted(run: Path, name: str) -> Path:
    """A copy of a run as it was after its second epoch."""
    copy = run.parent / name
    shutil.copytree(run, copy)
    for later in ("metrics.json", "model.safetensors"):
        (copy / later).unlink()
    for path in (copy / "checkpoints").iterdir():
        if path.name > MIDDLE or not path.name.startswith("step-"):
            path.unlink()
    return copy


def assert_same_states(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, moments and moving average, by name, relative to their norm.

    Biases of keys have no gradient but rounding, which AdamW makes steps of: hence not element by element.
    """
    assert one["average"]["steps"] == other["average"]["steps"]
    pairs = [(one["state_dict"], other["state_dict"]), (one["average"]["average"], other["average"]["average"])]
    (first,), (second,) = one["optimizer_states"], other["optimizer_states"]
    assert first["state"].keys() == second["state"].keys()
    pairs += [(first["state"][name], second["state"][name]) for name in first["state"]]
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert (theirs[name] - tensor).norm() <= 5e-3 * tensor.norm(), name


STATES, WEIGHTS = "strategy.offload_optimizer=true", "strategy.offload_parameters=true"


@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, ()), (2, ()), (3, ()), pytest.param(2, (STATES,), marks=pytest.mark.long), (3, (STATES, WEIGHTS))],
    ids=["1", "2", "3", "2-offload", "3-offload"],
)
def test_every_stage_trains_what_one_process_does(
    trained: Callable[..., Path], assert_same_curve: Callable[..., None], stage: int, offload: tuple[str, ...]
) -> None:
    """The same curves, and after two epochs the same weights, moments and average, in a file that holds no code."""
    one, many = trained("one", 0), trained("many", stage, *offload)
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    assert_same_curve(many, one, rel=1e-4, steps=36)
    assert_same_states(*(read_checkpoint(run / "checkpoints" / MIDDLE) for run in (one, many)))


def test_resumes_bit_for_bit(command: Command, trained: Callable[..., Path]) -> None:
    whole = trained("whole", 3)
    cut = interrupted(whole, "cut")
    command(PROGRAM, "--resume", "cut", "strategy.stage=3")
    ends = [load_file(run / "model.safetensors") for run in (whole, cut)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert losses(cut) == losses(whole)


def test_resumes_under_another_strategy(command: Command, trained: Callable[..., Path]) -> None:
    """ZeRO 3's checkpoint in one process, and one process's under ZeRO 2: weights, moments, average and all."""
    one = trained("one", 0)
    interrupted(one, "to_zero")
    # What is dropped is drawn for each micro-batch; `strategy=...` on a command line begins that section anew.
    command(PROGRAM, "--resume", "to_zero", *ZERO, "strategy.stage=2", "strategy.micro_batch=32")
    assert losses(one.parent / "to_zero") == pytest.approx(losses(one), rel=1e-5)
    many = trained("many", 3)
    interrupted(many, "to_one")
    command("fit", "--resume", "to_one", "strategy=single", "strategy.micro_batch=32")
    assert losses(many.parent / "to_one") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.long), 3])
def test_qlora(command: Command, small: Sequence[str], trained: Callable[..., Path], stage: int) -> None:
    """Packed bytes come out of partitioning and gathering as they went in; adapters learn what one process's do."""
    base = trained("base", 0)
    words = (
        "--recipe",
        "int4_sdpa",
        *small,
        DEPTH,
        "strategy.micro_batch=32",
        f"quantization.base={base.name}",
        f"strategy.checkpointing={str(stage == 3).lower()}",
    )
    command("fit", *words, "run.dir=one", "data.workers=0")
    command(PROGRAM, *words, *ZERO, f"strategy.stage={stage}", "run.dir=many")
    one, many = base.parent / "one", base.parent / "many"
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    alone, gathered = (load_file(run / "model.safetensors") for run in (one, many))
    packed = [name for name in alone if alone[name].dtype == torch.uint8]
    assert len(packed) >= 8
    assert all(torch.equal(alone[name], gathered[name]) for name in packed)
    adapters = [name for name in alone if "lora_" in name]
    assert adapters
    for name in adapters:
        torch.testing.assert_close(gathered[name], alone[name], rtol=1e-3, atol=1e-5)
