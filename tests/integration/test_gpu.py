"""Short runs on a GPU: clipping under every precision, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


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
