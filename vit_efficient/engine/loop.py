"""What happens between two optimizer steps: average, cursor, loss check, checkpoint, stop."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from vit_efficient.cluster.agreement import Agreement, Flags
from vit_efficient.cluster.preempt import StopSignals, signal_of
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.engine.background import Writer
from vit_efficient.engine.checkpoint import drop_checkpoints, name_checkpoint
from vit_efficient.engine.curve import StepLoss
from vit_efficient.engine.ranks import sum_over_ranks
from vit_efficient.engine.resume import Position, check_same_recipe, write_loops
from vit_efficient.engine.rundir import RunDir
from vit_efficient.engine.watch import LossWatch, refuse_non_finite
from vit_efficient.machine import rank
from vit_efficient.measure.memory import peak_memory_bytes, restart_peak
from vit_efficient.model.module import ViTModule
from vit_efficient.recipe.schema import CheckpointConfig

FORMAT = 1


class StopRun(Exception):  # noqa: N818 - not an error: the run was asked to stop and is saved
    """The run was asked to stop; its state is saved in ``checkpoint``."""

    def __init__(self, checkpoint: Path, reason: str) -> None:
        super().__init__(f"stopped by {reason}")
        self.checkpoint, self.reason = checkpoint, reason


@dataclass
class Clock:
    """Time and images of the training steps alone, summed over all resumptions.

    What the data module counts (`wait_seconds`, and `skipped` over all ranks) is here as it was before the last one.
    """

    train_seconds: float = 0.0
    images: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0
    skipped: int = 0


class RunLoop(L.Callback):
    """Keeps a run's place, saves it, and ends it in order when asked to.

    A checkpoint is only ever taken between two optimizer steps, with every rank at the same one.

    Args:
        run: the run's folder.
        config: when to save and how many checkpoints to keep.
        recipe: the resolved recipe as a plain mapping; goes into every checkpoint.
        accumulate: micro-batches in an optimizer step.
        log_every: optimizer steps between two at which the loss is read over all ranks.
    """

    def __init__(
        self, run: RunDir, config: CheckpointConfig, recipe: dict[str, Any], accumulate: int, log_every: int
    ) -> None:
        self.run, self.config, self.recipe, self.accumulate = run, config, recipe, accumulate
        self.log_every = log_every
        self.losses = StepLoss()
        self.signals = StopSignals()
        self.agreement = Agreement()
        self.writer = Writer(asynchronous=config.asynchronous)
        self.watch = LossWatch()
        self.position = Position(0, 0)
        self.clock = Clock()
        self.best = {"top1": -1.0, "epoch": 0}
        self.history: list[dict[str, float]] = []
        self.latest: dict[str, Any] = {}
        self.peak_memory = 0
        self.resumed_from: Path | None = None
        self._counted: dict[str, float] = {}
        self._saved: tuple[Position, Path] | None = None
        self._saved_at = time.monotonic()
        self._mark = time.monotonic()
        self._started = time.monotonic()

    # -- signals and time -------------------------------------------------------------------------------------------

    def fit(self, trainer: L.Trainer, module: ViTModule, data: ViTDataModule) -> None:
        """Train; from the first step on, signals are for `settle`.

        One that comes after the last step's agreement is for whoever has the signals afterwards, in this process alone.

        Raises:
            StopRun: asked to stop; the run is saved.
        """
        try:
            trainer.fit(module, datamodule=data, ckpt_path=self.resumed_from)
        finally:
            self.signals.restore()
        self.signals.pass_on()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        restart_peak(pl_module.device)  # the same process may have trained the base of these adapters

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        timeout = self.recipe["strategy"].get("timeout")
        self.agreement.open(pl_module.device, timedelta(seconds=timeout) if timeout is not None else None)
        self.signals.install()  # until `fit` gives them back
        self._saved_at = self._mark = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._mark = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.writer.wait()
        self.peak_memory = peak_memory_bytes(pl_module.device)  # here: afterwards Lightning moves the module to the CPU

    def _count_time(self) -> None:
        now = time.monotonic()
        self.clock.train_seconds += now - self._mark
        self._mark = now

    def elapsed(self) -> float:
        """Seconds of this run so far, earlier parts of a resumed run included."""
        return self.clock.seconds + time.monotonic() - self._started

    # -- after every step -------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ViTModule)
        self._count_time()
        assert pl_module.last_loss is not None
        self.losses.add(pl_module)
        self.watch.add(pl_module.last_loss, batch["step"], batch)
        if (batch_idx + 1) % self.accumulate and batch_idx + 1 < trainer.num_training_batches:
            return  # inside an optimizer step
        self.writer.check()
        pl_module.update_average()
        self.clock.images += batch["count"]
        epoch, step = divmod(batch["step"], pl_module.steps_per_epoch)
        self.position = Position(epoch, step + 1)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, ViTDataModule)
        datamodule.mark_step(epoch, step + 1)
        if step + 1 == pl_module.steps_per_epoch or trainer.global_step % self.log_every == 0:
            self.losses.read(trainer.world_size * self.accumulate)
            self._count_time()  # what the device still had to do
        self.losses.restart()

    def settle(self, trainer: L.Trainer, pl_module: ViTModule) -> None:
        """After a step that every callback has seen: save if it is time to, and leave if all ranks agreed on that."""
        at_end = self.position.step == pl_module.steps_per_epoch
        asked, due = self.agreement.outcome(self._flags())
        self._stop_if(trainer, asked)
        if not at_end and (due or self._due_by_steps()):  # at an epoch's end the checkpoint waits for the evaluation
            self.save(trainer)
        self.agreement.begin(self._flags())

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != "fit":
            return
        asked, _ = self.agreement.outcome(self._flags())
        if asked:
            assert isinstance(pl_module, ViTModule)
            pl_module.averaged_weights.close()
            self._stop_if(trainer, asked)
        self.agreement.begin(self._flags())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, ViTModule)
        self.latest = pl_module.metrics.compute()
        epoch = self.position.epoch + 1
        self.history.append({"epoch": epoch, "top1": self.latest["top1"], "loss": self.latest["loss"]})
        better = self.latest["top1"] > self.best["top1"]
        if better:
            self.best = {"top1": self.latest["top1"], "epoch": epoch}
        self.position = Position(self.position.epoch, self.position.step, validated=True)
        self.save(trainer, best=better)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once an epoch the ranks wait for each other: no signal of the last epoch's last moments is lost."""
        asked, _ = self.agreement.at_once(self._flags())
        self._stop_if(trainer, asked)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _due_by_steps(self) -> bool:
        every = self.config.every_steps
        return every is not None and self.position.step % every == 0

    def _flags(self) -> Flags:
        """What this rank has to say to the others."""
        minutes = self.config.every_minutes
        due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return self.signals.weight, int(due and rank() == 0)  # clocks differ between ranks: rank 0's counts

    def _stop_if(self, trainer: L.Trainer, asked: int) -> None:
        """Save, if that is not done yet, and leave, where the ranks have agreed on a signal of this weight."""
        if (number := signal_of(asked)) is not None:
            done = self._saved is not None and self._saved[0] == self.position
            path = self._saved[1] if self._saved is not None and done else self.save(trainer)
            self.writer.wait()
            raise StopRun(path, number.name)

    def save(self, trainer: L.Trainer, *, best: bool = False) -> Path:
        """Write a checkpoint of this moment; on rank 0 name it `last.ckpt` (and `best.ckpt`) and drop old ones."""
        module = trainer.lightning_module
        assert isinstance(module, ViTModule)
        refuse_non_finite(self.watch, module, trainer.global_step, trainer.global_rank)
        if self.position.step < module.steps_per_epoch:  # in an epoch: the steps that the device had not done yet
            self._count_time()
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._counted = {
            "wait_seconds": self.clock.wait_seconds + data.wait_seconds,
            "skipped": self.clock.skipped + sum_over_ranks(data.skipped),
        }
        folder = self.run.checkpoints
        path = folder / f"step-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            self.writer.do(lambda: self._settle(path, best))
        self._saved_at = self._mark = time.monotonic()
        self._saved = self.position, path
        return path

    def _settle(self, path: Path, best: bool) -> None:
        """Name a checkpoint that is written, and drop old ones."""
        folder = path.parent
        name_checkpoint(path, folder / "last.ckpt")
        if best:
            name_checkpoint(path, folder / "best.ckpt")
        drop_checkpoints(path, self.config.keep)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        clock = {**self.clock.__dict__, "seconds": self.elapsed(), **self._counted}
        checkpoint["vit_efficient"] = {
            "format": FORMAT,
            "position": self.position.state(),
            "recipe": self.recipe,
            "clock": clock,
            "best": dict(self.best),
            "history": list(self.history),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, ViTModule)
        own = checkpoint["vit_efficient"]
        check_same_recipe(own["recipe"], self.recipe, str(self.resumed_from))
        self.position = Position(**own["position"])
        self.clock = Clock(**own["clock"])
        self.best, self.history = dict(own["best"]), list(own["history"])
        micro = pl_module.steps_per_epoch * self.accumulate
        write_loops(checkpoint["loops"], self.position, pl_module.steps_per_epoch, self.accumulate, micro)


class Settle(L.Callback):
    """The last of the callbacks: what a step left for the others to show is shown before the run saves or ends."""

    def __init__(self, loop: RunLoop) -> None:
        self.loop = loop

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, ViTModule)
        if (batch_idx + 1) % self.loop.accumulate == 0 or batch_idx + 1 == trainer.num_training_batches:
            self.loop.settle(trainer, pl_module)
