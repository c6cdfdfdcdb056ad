"""A line for every training sample, for tests and for users who want proof of what was read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from vit_efficient.engine.watch import describe


class Audit(L.Callback):
    """Appends ``epoch step rank key`` to a file for every sample, once the optimizer step that used it is done.

    ``step`` counts optimizer steps within the epoch, from 0. Each step is one append, so ranks may share a file.
    A killed run may have gone on past its last checkpoint; the resumed one repeats those steps, and their lines.

    Args:
        path: the file; made if it is not there.
        accumulate: micro-batches in an optimizer step.
    """

    def __init__(self, path: Path, accumulate: int) -> None:
        self.path, self.accumulate = path, accumulate
        self._lines: list[str] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        epoch, step = divmod(batch["step"], pl_module.steps_per_epoch)
        self._lines += [f"{epoch} {step} {trainer.global_rank} {key}\n" for key in describe(batch)]
        if (batch_idx + 1) % self.accumulate:
            return
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, "".join(self._lines).encode())
        finally:
            os.close(file)
        self._lines = []
