"""What the training loop counts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from vit_efficient import fit
from vit_efficient.engine.curve import StepLoss

WAIT_S = 3.0


def test_what_the_device_still_has_to_do_at_an_epochs_end_is_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are queued ahead of the device; reading the loss waits for them, and that is time they took."""
    whole = StepLoss.read

    def read(self: StepLoss, pieces: int) -> None:
        time.sleep(WAIT_S)
        whole(self, pieces)

    monkeypatch.setattr(StepLoss, "read", read)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path))
    words = [
        "--recipe", "fp32_sdpa", "strategy.accelerator=cpu", "strategy=single", "data.workers=0",
        "data.batch_size=719", "optim.epochs=1", "optim.warmup_epochs=0", "run.log_every=1000", "run.dir=run",
        "model.kwargs={patch_size: 16, depth: 1, embed_dim: 12, num_heads: 1}",
    ]  # fmt: skip
    fit.main(words)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert WAIT_S < metrics["train_seconds"] < metrics["seconds"]
