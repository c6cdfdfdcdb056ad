"""The fast int8 model, its blocks fused, against the reference int8 model, on real weights and real images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("end_to_end.py")
NO_DATA = 2  # the script's exit code


def measured(tmp_path: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `end_to_end.py` measures in float32 and in bfloat16, every layer's bound kept on the same codes."""
    record = tmp_path / "record.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--output", str(record)], capture_output=True, text=True, timeout=500
    )
    if done.returncode == NO_DATA and "VIT_EFFICIENT_TEST_DATA" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    full, half = json.loads(record.read_text())["measurements"]
    assert (full["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert len(full["same_codes"]["layers"]) == len(half["same_codes"]["layers"]) == 48
    return full, half


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_on_a_gpu(tmp_path: Path, scheme: str) -> None:
    """Whole runs drift apart, by no more than twice what the smallest change of the images does to the reference; fp8
    units sum in some 14 bits, which changes more tops than that, but not more than bf16 does."""
    full, half = measured(tmp_path, "--images", "200", "--scheme", scheme, "--device", "cuda")
    assert full["same_codes"]["logits_error"] < (1e-5 if scheme == "int8" else 1e-3)
    fast, nudged = (full["whole_runs"][name] for name in ("fast against reference", "reference on larger images"))
    assert fast["logits_error"] < max(1e-2, 2 * nudged["logits_error"])
    against = "against reference in float32"
    ours, theirs = half["whole_runs"][f"fast {against}"], half["whole_runs"]["reference in this dtype against float32"]
    drifted = nudged if scheme == "int8" else theirs
    assert fast["top1_agreement"] >= min(0.995, drifted["top1_agreement"] - 0.01)
    assert ours["logits_error"] < 1.2 * theirs["logits_error"]


@pytest.mark.slow
def test_on_a_cpu_bit_for_bit(tmp_path: Path) -> None:
    full, half = measured(tmp_path, "--images", "4", "--batch", "4", "--calibration", "16", "--device", "cpu")
    for one in (full, half):
        assert one["same_codes"]["codes_equal"] == 1
        assert one["same_codes"]["logits_error"] == 0
    fast = full["whole_runs"]["fast against reference"]
    assert fast == {"codes_equal": 1, "logits_error": 0, "top1_agreement": 1}
    assert full["whole_runs"]["reference on larger images"]["codes_equal"] < 1  # so the comparison can tell
