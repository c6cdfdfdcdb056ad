"""Two real processes, each with its part of the model, train what one does; checkpoints go from any strategy to any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vit_efficient.engine.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
CPU = ("strategy.accelerator=cpu", "data.workers=0")
TWO = ("strategy.devices=2", *CPU)
Runs = Callable[[str], Path]


def run(folder: Path, cache: Path, *words: str) -> str:
    environment = {**os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path, small: Sequence[str]) -> Runs:
    """Gives the folder of a run of this name, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    words = {
        "single": ("strategy=single", *CPU),
        "ddp": ("strategy=ddp", *TWO),
        "fsdp": ("strategy=fsdp", *TWO, "checkpoint.sharded=true", "checkpoint.asynchronous=true", "optim.clip=0.7"),
    }

    def made(name: str) -> Path:
        path = folder / name
        if not path.exists():
            each = (
                "run.log_every=1",
                "checkpoint.every_steps=5",
                "checkpoint.keep=4",
                "optim.clip=0.7",
                f"data.audit={name}.txt",
            )
            run(
                folder,
                cache,
                "vit_efficient.fit",
                "--recipe",
                "fp32_sdpa",
                *small,
                *words[name],
                *each,
                f"run.dir={path}",
            )
        return path

    return made


def losses(path: Path) -> list[float]:
    return [epoch["loss"] for epoch in json.loads((path / "metrics.json").read_text())["history"]]


def cut(source: Path, step: int, out: Path) -> Path:
    """A copy of a run as it was after a step."""
    name = f"step-{step:08d}.ckpt"
    (out / "checkpoints").mkdir(parents=True)
    for file in ("recipe.yaml", "environment.json"):
        shutil.copy(source / file, out / file)
    kept = source / "checkpoints" / name
    (shutil.copytree if kept.is_dir() else shutil.copy)(kept, out / "checkpoints" / name)
    return out


def state(path: Path) -> dict[str, torch.Tensor]:
    """Weights, moving average and moments at a run's end, by name."""
    last: dict[str, Any] = read_checkpoint(path / "checkpoints" / "step-00000036.ckpt")
    moments = last["optimizer_states"][0]["state"]
    own = {f"{name} {kind}": value for name, kinds in moments.items() for kind, value in kinds.items()}
    weights = {k: v for k, v in last["state_dict"].items() if k.startswith("model.")}
    return own | weights | {f"average {k}": v for k, v in last["average"]["average"].items()}


def test_two_parts_are_one_model(runs: Runs, assert_same_curve: Callable[..., None]) -> None:
    """The same curves to float tolerance, the same samples in every step, the same state at the end."""
    one, two = runs("single"), runs("fsdp")
    assert_same_curve(two, one, rel=1e-4, steps=36)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    audits = [
        sorted(
            (e, s, k)
            for e, s, _, k in (line.split() for line in (path.parent / f"{path.name}.txt").read_text().splitlines())
        )
        for path in (one, two)
    ]
    assert audits[0] == audits[1]
    ours, theirs = state(two), state(one)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=2e-2, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_samples_leave_out_branches_alike(
    cache: Path, small: Sequence[str], tmp_path: Path, assert_same_curve: Callable[..., None]
) -> None:
    """By DDP, and by FSDP2 with blocks run again and parameters offloaded; then whole, for its evaluation."""
    words = (*small, *TWO, "model.kwargs.drop_path_rate=0.4", "run.log_every=1")
    for name, more in (("ddp", ()), ("fsdp", ("strategy.checkpointing=true", "strategy.offload=true"))):
        run(
            tmp_path, cache, "vit_efficient.fit", "--recipe", "fp32_sdpa", *words, f"strategy={name}", *more,
            f"run.dir={name}",
        )  # fmt: skip
    assert_same_curve(tmp_path / "fsdp", tmp_path / "ddp", rel=1e-4, steps=36)
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)


def test_a_copy_of_the_model_on_each_node(
    runs: Runs,
    cache: Path,
    free_port: int,
    small: Sequence[str],
    tmp_path: Path,
    assert_same_curve: Callable[..., None],
) -> None:
    """Two nodes of two processes, as torchrun tells them: sharded within each; the parts become the one model."""
    words = ("strategy=fsdp", "strategy.shard=hybrid", "strategy.nodes=2", *TWO, "checkpoint.sharded=true")
    each = ("--recipe", "fp32_sdpa", *small, *words, "optim.clip=0.7", "run.log_every=1", "run.dir=hybrid")
    common = {
        **os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "TORCHELASTIC_RUN_ID": "x",
    }  # fmt: skip
    processes = []
    try:
        for rank in range(4):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2)}
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "vit_efficient.fit", *each],
                    cwd=tmp_path, env=common | place, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        printed = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, "\n".join(printed)
    path = tmp_path / "hybrid"
    assert losses(path) == pytest.approx(losses(runs("single")), rel=1e-4)
    assert_same_curve(path, runs("single"), rel=1e-4, steps=36)
    run(tmp_path, cache, "vit_efficient.export", "consolidate", str(path), "--out", "weights.safetensors")
    words = ("--recipe", str(runs("single") / "recipe.yaml"), "model.weights=weights.safetensors")
    run(tmp_path, cache, "vit_efficient.evaluate", *words, "--output", "seen.json")
    expected = json.loads((path / "metrics.json").read_text())["loss"]
    assert json.loads((tmp_path / "seen.json").read_text())["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", ("strategy=single", *CPU)),
        pytest.param(
            "fsdp",
            ("strategy=fsdp", *TWO, "checkpoint.sharded=false", "checkpoint.asynchronous=false"),
            marks=pytest.mark.long,
        ),
        ("ddp", ("strategy=fsdp", *TWO)),
        pytest.param("single", ("strategy=fsdp", *TWO, "checkpoint.sharded=true"), marks=pytest.mark.long),
    ],
    ids=["parts-single", "parts-file", "ddp-fsdp", "single-parts"],
)
def test_any_strategy_goes_on_from_any(
    runs: Runs, before: str, after: tuple[str, ...], cache: Path, tmp_path: Path
) -> None:
    """Optimizer states too: moments that were lost or misplaced would show in the losses and in the state."""
    path = cut(runs(before), 29, tmp_path / "run")
    run(tmp_path, cache, "vit_efficient.fit", "--resume", str(path), *after)
    assert losses(path) == pytest.approx(losses(runs("single")), rel=1e-4)
    ours, theirs = state(path), state(runs("single"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=2e-2, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_parts_become_one_file(runs: Runs, cache: Path, tmp_path: Path) -> None:
    """Consolidated weights, evaluated, are what the run evaluated; the best and the newest checkpoints are kept."""
    path = runs("fsdp")
    checkpoints = path / "checkpoints"
    steps = sorted(p.name for p in checkpoints.glob("step-*.ckpt"))
    assert len(steps) in (4, 5)  # the best one may be older than the four newest
    assert steps[-1] == (checkpoints / "last.ckpt").resolve().name
    assert (checkpoints / "best.ckpt").resolve().is_dir()
    assert not list(checkpoints.glob(".*"))
    printed = run(tmp_path, cache, "vit_efficient.export", "consolidate", str(path), "--out", "weights.safetensors")
    assert "step 36" in printed
    words = ("strategy=single", "checkpoint.sharded=false", "model.weights=weights.safetensors")
    recipe = str(path / "recipe.yaml")
    run(tmp_path, cache, "vit_efficient.evaluate", "--recipe", recipe, *words, "--output", "seen.json")
    run(
        tmp_path,
        cache,
        "vit_efficient.evaluate",
        "--checkpoint",
        str(checkpoints / "last.ckpt"),
        "--output",
        "parts.json",
    )
    expected = json.loads((path / "metrics.json").read_text())["loss"]
    for name in ("seen.json", "parts.json"):
        assert json.loads((tmp_path / name).read_text())["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "words", "tolerance"),
    [
        ("int4_sdpa", (), 1e-4),
        pytest.param("lora_sdpa", ("strategy.checkpointing=true",), 1e-4, marks=pytest.mark.long),
        # A code that rounds otherwise changes others.
        pytest.param("int8_static_sdpa", ("quantization.learn_scales=true",), 2e-2, marks=pytest.mark.long),
    ],
)
def test_quantized_models_train_alike(
    runs: Runs,
    variant: str,
    words: tuple[str, ...],
    tolerance: float,
    cache: Path,
    small: Sequence[str],
    tmp_path: Path,
) -> None:
    base = f"model.weights={runs('single') / 'model.safetensors'}"
    each = ("--recipe", variant, *small, base, "optim.epochs=2", *words)
    each = tuple(word for word in each if word != "optim.epochs=3")
    run(tmp_path, cache, "vit_efficient.fit", *each, *CPU, "strategy=single", "run.dir=one")
    run(tmp_path, cache, "vit_efficient.fit", *each, *TWO, "strategy=fsdp", "run.dir=two")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    assert min(losses(tmp_path / "two")) > 0.1
