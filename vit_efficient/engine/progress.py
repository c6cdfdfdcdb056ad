"""The run's progress in a terminal: one live line, and one line an epoch that stays."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vit_efficient.engine.loop import RunLoop
from vit_efficient.model.module import ViTModule


class ConsoleProgress(L.Callback):
    """A live bar with loss and images/s where the output is a terminal; a line an epoch everywhere.

    Args:
        loop: knows the step and the last evaluation.
        console: where to write; rank 0 only.
        epochs: of the whole run.
    """

    def __init__(self, loop: RunLoop, console: Console, epochs: int) -> None:
        self.loop, self.console, self.epochs = loop, console, epochs
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epoch_mark = (0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch_mark = (self.loop.clock.images, self.loop.clock.train_seconds)
        if not (trainer.is_global_zero and self.console.is_terminal):
            return
        assert isinstance(pl_module, ViTModule)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("[cyan]{task.fields[speed]}"),
            TextColumn("[magenta]{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("training", total=self.epochs * pl_module.steps_per_epoch, speed="", loss="")
        self._bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is None or self._task is None or trainer.global_step % 5:
            return
        images, seconds = self._interval()
        speed = f"{images / seconds:,.0f} img/s" if seconds > 0 else ""
        self._bar.update(
            self._task,
            completed=trainer.global_step,
            description=f"epoch {self.loop.position.epoch + 1}/{self.epochs}",
            speed=speed,
            loss=self._loss("loss"),
        )

    def _loss(self, name: str) -> str:
        """Of the last step at which it was read (`run.log_every`, and each epoch's last)."""
        value = self.loop.losses.value.get("loss")
        return f"{name} {value:.3f}" if value is not None else ""

    def _interval(self) -> tuple[int, float]:
        images, seconds = self._epoch_mark
        return self.loop.clock.images - images, self.loop.clock.train_seconds - seconds

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        images, seconds = self._interval()
        latest = self.loop.latest
        speed = f"{images / seconds:>7,.0f} img/s" if images and seconds else ""
        loss = self._loss("train loss")
        self.console.print(
            f"epoch {self.loop.position.epoch + 1:>3}/{self.epochs}  {loss}  eval loss {latest['loss']:.3f}  "
            f"[bold]top-1 {latest['top1']:.2%}[/]  {speed}",
            highlight=False,
        )
        self._epoch_mark = (self.loop.clock.images, self.loop.clock.train_seconds)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()
