"""What TensorBoard shows of a run."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from vit_efficient.engine.board import Board
from vit_efficient.engine.figures import confusion_figure
from vit_efficient.engine.loop import RunLoop
from vit_efficient.engine.ranks import sum_over_ranks
from vit_efficient.measure.memory import peak_memory_bytes
from vit_efficient.model.module import ViTModule
from vit_efficient.parallel.clip import gradient_norm
from vit_efficient.parallel.deepspeed import ZeroStrategy


class Monitor(L.Callback):
    """Writes loss, rate, gradient norm, speed, data wait, memory, accuracy, example images and the confusion matrix.

    Args:
        loop: knows the step, the clock and the last evaluation.
        class_names: names on the confusion matrix.
    """

    def __init__(self, loop: RunLoop, class_names: list[str]) -> None:
        self.loop, self.class_names = loop, class_names
        self.gradient_norm = 0.0
        self._norm: Tensor | None = None
        self.images_per_second = 0.0
        self.wait_share = 0.0
        self._since = (time.monotonic(), 0, 0.0)
        self._shown = False

    def _writer(self, trainer: L.Trainer) -> Board | None:
        logger = trainer.logger
        return logger if isinstance(logger, Board) and trainer.is_global_zero else None

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart_interval(trainer)

    def _restart_interval(self, trainer: L.Trainer) -> None:
        waited = trainer.datamodule.wait_seconds  # type: ignore[attr-defined]
        self._since = (time.monotonic(), self.loop.clock.images, waited)

    def _log_next(self, trainer: L.Trainer) -> bool:
        return (trainer.global_step + 1) % self.loop.log_every == 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self._log_next(trainer) and not isinstance(
            trainer.strategy, ZeroStrategy
        ):  # after unscaling, before clipping
            self._norm = gradient_norm(p for group in optimizer.param_groups for p in group["params"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ViTModule)
        writer = self._writer(trainer)
        if writer is not None and not self._shown:
            self._show_examples(writer, pl_module, batch)
        step = trainer.global_step
        stepped = (batch_idx + 1) % self.loop.accumulate == 0 or batch_idx + 1 == trainer.num_training_batches
        if not stepped or step % self.loop.log_every:
            return
        then, images, waited = self._since
        seconds = max(time.monotonic() - then, 1e-9)
        self.images_per_second = (self.loop.clock.images - images) / seconds
        self.wait_share = (trainer.datamodule.wait_seconds - waited) / seconds  # type: ignore[attr-defined]
        self._restart_interval(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        skips = data.config.on_error == "skip"
        skipped = self.loop.clock.skipped + sum_over_ranks(data.skipped) if skips else 0
        if isinstance(trainer.strategy, ZeroStrategy):
            self.gradient_norm = trainer.strategy.gradient_norm()
        elif self._norm is not None:
            self.gradient_norm = float(self._norm)  # here, where the loss is read: elsewhere the GPU would run dry
        if writer is None:
            return
        scalars = {
            **{f"train/{name}": loss for name, loss in self.loop.losses.value.items()},
            "train/learning_rate": max(g["lr"] for g in trainer.optimizers[0].param_groups),
            "train/gradient_norm": self.gradient_norm,
            "speed/images_per_second": self.images_per_second,
            "speed/data_wait_share": self.wait_share,
            "memory/peak_bytes": peak_memory_bytes(pl_module.device),
            "train/epoch": self.loop.position.epoch + self.loop.position.step / pl_module.steps_per_epoch,
        }
        if skips:
            scalars["data/skipped_samples"] = skipped
        writer.log_metrics(scalars, step)

    def _show_examples(self, writer: Board, module: ViTModule, batch: dict[str, Any]) -> None:
        """The first images as the network sees them, augmented and mixed, once a run."""
        self._shown = True
        images, _ = module.transforms(batch)
        shown = images[:16].float().cpu()
        low, high = shown.amin((1, 2, 3), keepdim=True), shown.amax((1, 2, 3), keepdim=True)
        seen, step = (shown - low) / (high - low).clamp_min(1e-6), self._step(module)
        writer.draw(lambda: writer.experiment.add_images("examples/train", seen, step))

    @staticmethod
    def _step(module: ViTModule) -> int:
        return module.trainer.global_step

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = self._writer(trainer)
        if writer is None:
            return
        latest = self.loop.latest
        writer.log_metrics({f"evaluation/{k}": latest[k] for k in ("top1", "top5", "f1", "loss")}, trainer.global_step)
        figure = confusion_figure(latest["confusion"], self.class_names)
        writer.draw(lambda: writer.experiment.add_figure("evaluation/confusion", figure, trainer.global_step))
