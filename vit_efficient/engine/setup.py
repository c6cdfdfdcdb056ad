"""Recipe -> data and transforms, and what a person is told before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.device import DeviceTransforms
from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.trainer import devices, world_size
from vit_efficient.measure.units import count
from vit_efficient.model.build import Built
from vit_efficient.model.distill import Teacher
from vit_efficient.model.module import learning_rate
from vit_efficient.recipe.schema import Recipe


def build_data(recipe: Recipe) -> ViTDataModule:
    """The DataModule of a resolved recipe. Its image size and statistics come later, from the model.

    Raises:
        DataError: shards missing, empty or damaged; the message says how to make them.
    """
    assert recipe.strategy.micro_batch is not None, "resolve() makes the micro-batch concrete"
    assert recipe.data.workers is not None, "resolve() makes the number of workers concrete"
    return ViTDataModule(
        recipe.data,
        recipe.augment,
        seed=recipe.run.seed,
        micro_batch=recipe.strategy.micro_batch,
        eval_batch=recipe.data.eval_batch_size or max(recipe.strategy.micro_batch, 64),
        workers=recipe.data.workers,
    )


def build_transforms(recipe: Recipe, image: ImageSpec, num_classes: int) -> DeviceTransforms:
    """What happens to a batch on the device: normalisation, erasing, mixup, cutmix, soft targets."""
    return DeviceTransforms(
        image, num_classes, recipe.augment, label_smoothing=recipe.optim.label_smoothing, seed=recipe.run.seed
    )


def class_balance(counts: Sequence[int], names: Sequence[str]) -> str:
    """One line that shows how even the classes are."""
    low, high = min(counts), max(counts)
    if low == high:
        return f"{len(counts)} classes, {low} images each"
    fewest, most = names[counts.index(low)], names[counts.index(high)]
    line = f"{len(counts)} classes, {low} ({fewest}) to {high} ({most}) images"
    return line + (f": imbalanced {high / max(low, 1):.1f} to 1, see macro F1" if high >= 1.5 * max(low, 1) else "")


def describe(
    console: Console,
    recipe: Recipe,
    built: Built,
    data: ViTDataModule,
    teacher: Teacher | None = None,
    calibrated: Sequence[str] = (),
) -> None:
    """Say what is about to be trained, on what."""
    per_node, nodes = devices(recipe)
    rate = learning_rate(recipe.optim, recipe.quantization)
    where = f"{recipe.strategy.accelerator}, {recipe.quantization.precision}"
    if world_size(recipe) > 1:
        where += f", {nodes} x {per_node} processes ({recipe.strategy.name})"
    rows = [
        ("model", f"{recipe.model.name}, {built.image.size} px, {count(built.parameters)} parameters, "
                  f"{count(built.trainable)} trained"),
        ("data", f"{data.train_images:,} images to train on, {data.eval_manifest.samples:,} to evaluate on; "
                 f"{class_balance(data.class_counts, data.class_names)}"),
        ("attention", recipe.attention.name),
        ("optimizer", f"{recipe.optim.name}, rate {rate:g}, {recipe.optim.epochs} epochs of "
                      f"{data.steps_per_epoch} steps, batch {recipe.data.batch_size}"),
        ("runs on", where),
    ]  # fmt: skip
    if teacher is not None:
        rows.insert(1, ("teacher", str(teacher)))
    for what, text in rows:
        console.print(f"[bold]{what:>13}[/]  {text}", highlight=False, soft_wrap=True)
    for line in [*built.report.lines(), *calibrated]:
        console.print(f"[bold]{'quantization':>13}[/]  {line}", highlight=False, soft_wrap=True)
    lora = getattr(recipe.quantization, "lora", None)
    if lora is not None and lora.lr_scale != 1:
        console.print(f"[bold]{'':>13}[/]  adapters learn at optim.lr x {lora.lr_scale:g} (quantization.lora.lr_scale)")
    for note in built.notes:
        console.print(f"[bold]{'note':>13}[/]  {note}", highlight=False, soft_wrap=True)
