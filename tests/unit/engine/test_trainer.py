"""Trainers leave signals to whoever has them."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from vit_efficient.engine.trainer import build_trainer, quiet
from vit_efficient.machine import detect
from vit_efficient.recipe.compat import resolve
from vit_efficient.recipe.load import load_recipe


class Looking(L.LightningModule):
    """Notes who has SIGTERM while it is evaluated; asked to, it is interrupted as by Ctrl-C."""

    def __init__(self, interrupted: bool = False) -> None:
        super().__init__()
        self.interrupted = interrupted
        self.owner: Any = None

    def validation_step(self, batch: Any, number: int) -> None:
        self.owner = signal.getsignal(signal.SIGTERM)
        if self.interrupted:
            os.kill(os.getpid(), signal.SIGINT)


def evaluate(module: Looking) -> None:
    quiet()
    recipe = load_recipe("fp32_sdpa", ["strategy=single", "strategy.accelerator=cpu"]).recipe
    trainer = build_trainer(resolve(recipe, detect())[0], run_dir=None, callbacks=[])
    trainer.validate(module, torch.zeros(2, 1), verbose=False)


def test_evaluation_leaves_sigterm_alone() -> None:
    before, module = signal.getsignal(signal.SIGTERM), Looking()
    evaluate(module)
    assert module.owner is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_is_given_back() -> None:
    """Lightning ignores it from the first one on, as it cleans up; a notebook must hear the next."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        evaluate(Looking(interrupted=True))
    assert signal.getsignal(signal.SIGINT) is before
