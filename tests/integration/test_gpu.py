"""Short runs on a GPU: clipping under every precision, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu

Start = Callable[..., subprocess.Popen[str]]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", ["fp32_sdpa", "int8_sdpa", "int4_sdpa"])
def test_a_short_run_on_a_gpu(variant: str, precision: str, tmp_path: Path) -> None:
    """Every precision trains with clipping, and the peak is the GPU's, far below what the process holds on the host."""
    words = [
        "--recipe", variant, f"quantization.precision={precision}", "optim.epochs=1", "optim.warmup_epochs=0",
        "optim.clip=0.5", "run.dir=run", "model.kwargs={patch_size: 8, depth: 2}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "vit_efficient.fit", *words], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["loss"] < 3
    assert 10e6 < metrics["peak_memory_bytes"] < 600e6


LEARNED = (
    "int8_sdpa", "quantization.activations=static", "quantization.weight_bits=4", "quantization.learn_scales=true",
)  # fmt: skip


@pytest.mark.parametrize("variant", [("fp32_sdpa",), ("int8_sdpa",), LEARNED, ("int4_sdpa",)], ids=lambda v: v[-1])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_no_step_waits_for_the_gpu(variant: tuple[str, ...], strategy: str, start_with: Start, tmp_path: Path) -> None:
    """Between two points of TensorBoard nothing asks the GPU for a number, so the host can prepare the next steps."""
    if strategy != "single" and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    words = [
        f"strategy={strategy}", "optim.epochs=1", "optim.warmup_epochs=0", "optim.clip=1", "optim.ema=0.9",
        "data.batch_size=64", "run.log_every=1000", "augment.mixup=0.8", "augment.cutmix=1", "augment.erasing=0.25",
        "model.kwargs={patch_size: 8, depth: 2, drop_path_rate: 0.1}",
    ]  # fmt: skip
    process = start_with("waits:6:18", "--recipe", *variant, *words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    noted = [line.split() for line in (tmp_path / "waits.txt").read_text().splitlines()]
    assert {forbidden for _, forbidden in noted} == {"True"}
    assert len({pid for pid, _ in noted}) == (1 if strategy == "single" else torch.cuda.device_count())


def test_the_peak_leaves_out_the_base_that_was_trained_before(tmp_path: Path) -> None:
    """The first run trains its base in the same process, the second finds it there; both hold as much."""
    peaks = []
    for run in ("first", "second"):
        words = [
            "--recipe", "int4_sdpa", "optim.epochs=1", "optim.warmup_epochs=0", f"run.dir={run}",
            "model.kwargs={patch_size: 8, depth: 2}",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "vit_efficient.fit", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        peaks.append(json.loads((tmp_path / run / "metrics.json").read_text())["peak_memory_bytes"])
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_training_steps_with_and_without_room(tmp_path: Path) -> None:
    """Memory is counted, and near what was estimated; held to less than it needs, a run fails and says so."""
    words = [
        "--batch", "256", "--steps", "3", "--warm-up", "2", "--rounds", "1", "--output", "figures.json",
        "model.image_size=224", "strategy=single",
    ]  # fmt: skip
    command = [sys.executable, "-m", "vit_efficient.benchmark", "training", "--recipe", "fp32_sdpa", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert row["peak"] == pytest.approx(row["estimated"], rel=0.15)
    assert row["reserved"] >= row["peak"]
    command += ["--memory", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "OutOfMemoryError" in done.stderr
