"""One run, from a resolved recipe to a folder with its metrics and its model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.device import DeviceTransforms
from vit_efficient.engine.audit import Audit
from vit_efficient.engine.calibration import calibrate_model, needs_calibration, restore
from vit_efficient.engine.checkpoint import read_checkpoint
from vit_efficient.engine.deployed import load_file, save_deployed
from vit_efficient.engine.evaluation import evaluate_model, speed_up
from vit_efficient.engine.guard import Guard
from vit_efficient.engine.loop import RunLoop, Settle
from vit_efficient.engine.monitor import Monitor
from vit_efficient.engine.progress import ConsoleProgress
from vit_efficient.engine.ranks import sum_over_ranks
from vit_efficient.engine.resume import check_same_recipe
from vit_efficient.engine.rundir import RunDir, write_json, write_text
from vit_efficient.engine.setup import build_data, build_transforms, describe
from vit_efficient.engine.trainer import accumulate, build_trainer, quiet
from vit_efficient.errors import UserError
from vit_efficient.machine import Machine, rank
from vit_efficient.measure.record import environment
from vit_efficient.model.build import Built, build_model, prepare_training
from vit_efficient.model.distill import Teacher, build_teacher
from vit_efficient.model.module import ViTModule, learning_rate
from vit_efficient.parallel.full import is_sharded, unshard
from vit_efficient.recipe.load import dump_recipe
from vit_efficient.recipe.schema import Recipe


@dataclass
class Result:
    """What a finished run has to show; accuracies are fractions of 1."""

    run: RunDir
    metrics: dict[str, Any]


def make_module(
    recipe: Recipe, built: Built, data: ViTDataModule, transforms: DeviceTransforms, teacher: Teacher | None = None
) -> ViTModule:
    """The LightningModule of a recipe, its blocks prepared for training."""
    prepare_training(built, recipe)
    return ViTModule(
        built.model,
        transforms,
        recipe.optim,
        lr=learning_rate(recipe.optim, recipe.quantization),
        num_classes=data.num_classes,
        steps_per_epoch=data.steps_per_epoch,
        seed=recipe.run.seed,
        adapters_only=getattr(recipe.quantization, "lora", None) is not None,  # the base is frozen and has its own file
        base=built.origin,
        teacher=teacher,
        freeze_ranges=getattr(recipe.quantization, "freeze_ranges", 0.0),
    )


def train(
    recipe: Recipe,
    machine: Machine,
    run: RunDir,
    console: Console,
    *,
    base: str | None = None,
    resume: Path | None = None,
) -> Result:
    """Train, write the deployed model, evaluate that file, and put it all into the run's folder.

    The figures are those of the last epoch's weights (their moving average, with ``optim.ema``) in deployed form.
    Choosing the best epoch by the same images that it is then reported on would flatter it; ``best_top1`` says what
    that choice would have given, and ``best.ckpt`` keeps it.

    Args:
        recipe: resolved for this machine.
        machine: where this is.
        run: its folder, which the caller has seen to be free (`RunDir.check_new`), or, with ``resume``, the one that
            the checkpoint lies in.
        console: where people read.
        base: weights that adapters start from, in place of ``model.weights``.
        resume: checkpoint to go on from.

    Raises:
        UserError: whatever the user can mend.
        StopRun: asked to stop; the run is saved.
    """
    with Guard(recipe, run.path, rank()) as guard:
        return _train(recipe, machine, run, console, guard, base=base, resume=resume)


def _train(
    recipe: Recipe,
    machine: Machine,
    run: RunDir,
    console: Console,
    guard: Guard,
    *,
    base: str | None,
    resume: Path | None,
) -> Result:
    quiet()
    plain = recipe.model_dump(mode="json")
    checkpoint = None
    if resume is not None:  # before anything is built: a wrong checkpoint is known at once
        checkpoint = read_checkpoint(resume)
        check_same_recipe(checkpoint["vit_efficient"]["recipe"], plain, str(resume))
    data = build_data(recipe)
    torch.manual_seed(recipe.run.seed)
    built = build_model(recipe, data.num_classes, base=base)
    if not built.trainable:
        raise UserError(
            f"quantization={recipe.quantization.name} leaves nothing to train here. Set quantization.lora, take a "
            "variant that trains, or measure it without training: `python -m vit_efficient.evaluate`."
        )
    data.image = built.image
    calibrated: list[str] = []
    if needs_calibration(recipe) and checkpoint is not None:
        restore(built.model, checkpoint, str(resume))
    elif needs_calibration(recipe):
        calibrated = calibrate_model(recipe, built.model, data, built.image, console)
    del checkpoint  # as large as the model and its optimizer; Lightning reads its own copy
    transforms = build_transforms(recipe, built.image, data.num_classes)
    teacher = build_teacher(recipe, built.image, data.num_classes, base=base)
    describe(console, recipe, built, data, teacher, calibrated)
    module = make_module(recipe, built, data, transforms, teacher)

    if rank() == 0:
        run.create()
        if resume is None:
            write_text(run.recipe, dump_recipe(recipe))
        write_json(run.environment, environment(machine))
    loop = RunLoop(run, recipe.checkpoint, plain, accumulate(recipe), recipe.run.log_every)
    loop.resumed_from = resume
    callbacks: list[Any] = [loop, Monitor(loop, data.class_names)]
    callbacks.append(ConsoleProgress(loop, console, recipe.optim.epochs))
    if recipe.data.audit is not None:
        callbacks.insert(0, Audit(recipe.data.audit, accumulate(recipe)))
    callbacks += [guard, Settle(loop)]  # the last, since it may end the run
    trainer = build_trainer(recipe, run_dir=run.path, callbacks=callbacks, writer=loop.writer)
    guard.watch(trainer)
    loop.fit(trainer, module, data)

    module.keep_average()
    if is_sharded(built.model):
        unshard(built.model)
    if rank() == 0:
        save_deployed(run.model, built.model.cpu(), recipe, data.class_names)
    _barrier()
    deployed = load_file(run.model)
    for line in speed_up(deployed.model, recipe):
        console.print(f"[bold]{'shipped':>13}[/]  {line}", soft_wrap=True)
    figures, device_bytes, _ = evaluate_model(deployed.model, data, transforms, recipe, [guard])
    metrics = {
        **{name: figures[name] for name in ("top1", "top5", "f1", "loss", "samples")},
        "epochs": recipe.optim.epochs,
        "steps": trainer.global_step,
        "images_per_second": loop.clock.images / max(loop.clock.train_seconds, 1e-9),
        "seconds": loop.elapsed(),
        "train_seconds": loop.clock.train_seconds,
        "data_wait_share": (loop.clock.wait_seconds + data.wait_seconds) / max(loop.clock.train_seconds, 1e-9),
        "peak_memory_bytes": loop.peak_memory,
        "parameters": built.parameters,
        "trainable_parameters": built.trainable,
        "quantized_parameters": built.report.quantized_parameters,
        "weight_bytes": run.model.stat().st_size,
        "device_bytes": device_bytes,
        "fp32_bytes": 4 * built.parameters,
        "skipped_samples": loop.clock.skipped + sum_over_ranks(data.skipped),
        "best_top1": loop.best["top1"],
        "best_epoch": loop.best["epoch"],
        "per_class": dict(zip(data.class_names, figures["per_class"].tolist(), strict=True)),
        "class_counts": dict(zip(data.class_names, data.class_counts, strict=True)),
        "history": loop.history,
    }
    if rank() == 0:
        write_json(run.metrics, metrics)
    _barrier()  # nobody looks for what rank 0 has not written yet
    return Result(run, metrics)


def _barrier() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
