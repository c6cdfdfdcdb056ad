"""What the training loop counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vit_efficient import fit
from vit_efficient.engine import loop
from vit_efficient.engine.curve import StepLoss

WAIT_S = 5.0


@pytest.mark.parametrize(("owner", "name"), [(StepLoss, "read"), (loop, "refuse_non_finite")], ids=["epoch", "save"])
def test_what_the_device_still_has_to_do_is_training(
    owner: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are queued ahead of the device; an epoch's end, and a save in it, wait for them: that is time they took.

    The save behind the evaluation has no steps to wait for: what it waits for is not training.
    """
    whole = getattr(owner, name)

    def wait(*words: Any) -> None:
        time.sleep(WAIT_S)
        whole(*words)

    monkeypatch.setattr(owner, name, wait)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path))
    words = [
        "--recipe", "fp32_sdpa", "strategy.accelerator=cpu", "strategy=single", "data.workers=0",
        "data.batch_size=719", "optim.epochs=1", "optim.warmup_epochs=0", "run.log_every=1000", "run.dir=run",
        "model.kwargs={patch_size: 16, depth: 1, embed_dim: 12, num_heads: 1}", "checkpoint.every_steps=1",
    ]  # fmt: skip
    fit.main(words)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert WAIT_S < metrics["train_seconds"] < 2 * WAIT_S
