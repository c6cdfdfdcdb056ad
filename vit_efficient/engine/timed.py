"""One process of a run that is timed: what `fit` builds, with one batch again and again in place of the data."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch

from vit_efficient.data.fixed import FixedData
from vit_efficient.engine.calibration import training_device
from vit_efficient.engine.contenders import build_random
from vit_efficient.engine.guard import Guard
from vit_efficient.engine.loop import RunLoop, Settle
from vit_efficient.engine.monitor import Monitor
from vit_efficient.engine.rundir import RunDir
from vit_efficient.engine.setup import build_transforms
from vit_efficient.engine.train import make_module
from vit_efficient.engine.trainer import accumulate, build_trainer, quiet
from vit_efficient.errors import UserError
from vit_efficient.machine import rank
from vit_efficient.measure.known import classes_of
from vit_efficient.measure.memory import CONTEXT
from vit_efficient.model.distill import build_teacher
from vit_efficient.recipe.schema import Recipe


@dataclass(frozen=True)
class Timed:
    """What one rank saw.

    Args:
        seconds: of each measured optimizer step, from the end of one to the end of the next.
        loss: of the last micro-batch.
        peak: bytes of the allocator at most, from the start of training; None on a CPU.
        reserved: bytes that the allocator took from the device at most; None on a CPU.
    """

    seconds: tuple[float, ...]
    loss: float
    peak: int | None
    reserved: int | None


class StepClock(L.Callback):
    """Notes when optimizer steps end, and ends the training when there are enough.

    To be the last callback but `Settle`. On a GPU by events, so that nothing waits for the device before the last step
    is done.

    Args:
        accumulate: micro-batches of a step.
        warm_up: steps that are not measured.
        steps: that are.
    """

    def __init__(self, accumulate: int, warm_up: int, steps: int) -> None:
        self.accumulate, self.warm_up, self.steps = accumulate, warm_up, steps
        self.loss = float("nan")
        self.reserved: int | None = None
        self._ends: list[Any] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done, inside = divmod(batch_idx + 1, self.accumulate)
        if inside or done < self.warm_up:
            return
        on_gpu = pl_module.device.type == "cuda"
        if on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._ends.append(event)
        else:
            self._ends.append(time.perf_counter())
        if done == self.warm_up + self.steps:
            trainer.should_stop = True
            self.loss = float(pl_module.last_loss)  # type: ignore[arg-type]  # waits for the device
            self.reserved = torch.cuda.max_memory_reserved(pl_module.device) if on_gpu else None

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each measured step."""
        pairs = zip(self._ends, self._ends[1:], strict=False)
        if self._ends and not isinstance(self._ends[0], float):
            return tuple(before.elapsed_time(after) / 1e3 for before, after in pairs)
        return tuple(after - before for before, after in pairs)


def hold_to(memory: float, device: torch.device) -> None:
    """Let this process have so much of its GPU and no more: the allocator gets what the CUDA context leaves.

    Args:
        memory: bytes.
        device: a GPU.

    Raises:
        UserError: nothing would be left, or the GPU has less.
    """
    has = torch.cuda.get_device_properties(device).total_memory
    if not CONTEXT < memory <= has:
        raise UserError(
            f"--memory {memory / 2**30:g}: this GPU has {has / 2**30:.0f} GiB, of which the CUDA context takes "
            f"{CONTEXT / 2**30:g}. Take something between."
        )
    torch.cuda.set_per_process_memory_fraction((memory - CONTEXT) / has, device)


def time_training(
    recipe: Recipe,
    run: RunDir,
    *,
    steps: int,
    warm_up: int,
    memory: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Timed:
    """Train on one batch until enough steps are measured. As `fit` does, this may start further processes.

    Module, strategy, trainer, and the callbacks that do something in every step are those of `fit`. No checkpoint is
    written, unless the recipe asks for one within so many steps, and nothing is evaluated.

    Args:
        recipe: resolved.
        run: an empty folder, of its own.
        steps: optimizer steps that are measured.
        warm_up: of which the first compile, and choose kernels; at least 1.
        memory: bytes that the process may have of its GPU; None: all.
        tell: what a person should know.

    Raises:
        UserError: the recipe trains nothing; what `fit` would refuse.
    """
    quiet()
    device = training_device(recipe)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if memory is not None:
            hold_to(memory, device)
    classes = classes_of(recipe)
    built = build_random(recipe, classes, device, tell, recipe.variant)
    if not built.trainable:
        raise UserError(f"{recipe.variant} leaves nothing to train: quantization={recipe.quantization.name}.")
    built.model.cpu()  # what was calibrated is on its device; where a model trains is for the strategy to say
    assert recipe.strategy.micro_batch is not None, "resolve() makes the micro-batch concrete"
    data = FixedData(
        recipe.data, recipe.augment, num_classes=classes, steps=warm_up + steps + 1,
        micro_batch=recipe.strategy.micro_batch, seed=recipe.run.seed,
    )  # fmt: skip
    data.set_image(built.image)
    transforms = build_transforms(recipe, built.image, classes)
    teacher = build_teacher(recipe, built.image, classes, base=getattr(recipe.quantization, "base", None))
    module = make_module(recipe, built, data, transforms, teacher)
    if rank() == 0:
        run.create()
    loop = RunLoop(run, recipe.checkpoint, recipe.model_dump(mode="json"), accumulate(recipe), recipe.run.log_every)
    clock = StepClock(accumulate(recipe), warm_up, steps)
    with Guard(recipe, run.path, rank()) as guard:
        callbacks: list[Any] = [loop, Monitor(loop, data.class_names), guard, clock, Settle(loop)]
        trainer = build_trainer(recipe, run_dir=run.path, callbacks=callbacks, writer=loop.writer)
        trainer.limit_val_batches = 0
        guard.watch(trainer)
        loop.fit(trainer, module, data)
    peak = loop.peak_memory if device.type == "cuda" else None
    return Timed(clock.seconds, clock.loss, peak, clock.reserved)
