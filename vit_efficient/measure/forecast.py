"""`submit --estimate`: hours, memory and GPU-hours of a recipe on GPUs that need not be here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vit_efficient.errors import UserError
from vit_efficient.measure.gpus import KINDS, GpuKind, gpu_kind
from vit_efficient.measure.layout import Layout
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.scaling import DISK, IMAGES_A_CORE, StepTime, step_time

if TYPE_CHECKING:
    from vit_efficient.recipe.schema import Recipe

# Images to train and to evaluate with, and classes, where no shards are at hand to ask.
SETS = {
    "imagenet": (1_281_167, 50_000, 1000),
    "tiny_imagenet": (100_000, 10_000, 200),
    "cifar10": (50_000, 10_000, 10),
    "digits": (1_437, 360, 10),
}
CORES = 8  # that load data for each GPU: what recipes take at most
GPUS = tuple(2**n for n in range(11))


@dataclass(frozen=True)
class Forecast:
    """A whole run on one kind of GPU.

    Args:
        layout: how the model is spread.
        micro_batch: images that a device holds at once.
        checkpointing: whether blocks are recomputed.
        memory: bytes of each device.
        fits: whether it has them.
        step: one optimizer step.
        images_per_second: of all devices.
        hours: training, evaluation after each epoch, and checkpoints.
    """

    layout: Layout
    micro_batch: int
    checkpointing: bool
    memory: int
    fits: bool
    step: StepTime
    images_per_second: float
    hours: float

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.layout.world


def forecast(
    recipe: Recipe,
    kind: GpuKind,
    nodes: int = 1,
    gpus_per_node: int = 1,
    *,
    plan: Plan | None = None,
    images: tuple[int, int] | None = None,
) -> Forecast:
    """What a recipe's run takes.

    Args:
        recipe: its precision resolved; `strategy` may be `auto`: `single` on one device, else `ddp`.
        kind: of the GPUs.
        nodes: how many machines.
        gpus_per_node: GPUs of each.
        plan: of an earlier call with the same recipe, so that nothing is counted twice.
        images: to train and to evaluate with; None: by the name of the data's source.

    Raises:
        UserError: the batch cannot be divided; the number of images is not known.
    """
    world = nodes * gpus_per_node
    batch = recipe.data.batch_size
    if batch % world:
        raise UserError(f"data.batch_size is {batch}, which {world} GPUs cannot share equally.")
    counts = SETS.get(recipe.data.source.name)
    train, evaluated = images or (counts[:2] if counts else (0, 0))
    if not train:
        raise UserError(f"How many images has data.source={recipe.data.source.name}? Give --images TRAIN EVAL.")
    plan = Plan(recipe, recipe.model.num_classes or (counts[2] if counts else 1000)) if plan is None else plan
    layout = _layout(recipe, nodes, gpus_per_node)
    share = batch // world
    micro = min(recipe.strategy.micro_batch or share, share)
    while share % micro:
        micro -= 1
    checkpointing, narrow = recipe.strategy.checkpointing, layout.kind == "fsdp"
    accumulate = share // micro
    needed = plan.estimate(layout, micro, checkpointing=checkpointing, accumulate=accumulate)
    _, work = plan.count(micro, checkpointing=checkpointing, narrow=narrow)
    blocks = len(plan.built.blocks)
    weights = plan.weights(layout)
    step = step_time(
        work, layout, weights, kind, images=share, accumulate=accumulate, compiled=recipe.strategy.compile,
        adapted=bool(plan.built.report.adapters), average=recipe.optim.ema is not None,
        gathered=blocks * weights.block + weights.rest, blocks=blocks, cores=CORES,
    )  # fmt: skip
    speed = batch / step.seconds
    steps = -(-train // batch) * recipe.optim.epochs
    # A forward pass is a third of a step's arithmetic; every epoch ends with an evaluation and a checkpoint.
    evaluation = max(evaluated / speed / 3, evaluated / (IMAGES_A_CORE * CORES * world))
    saved = (weights.size + 12 * weights.trained) / DISK
    seconds = steps * step.seconds + recipe.optim.epochs * (evaluation + saved)
    return Forecast(
        layout, micro, checkpointing, needed.total, needed.total <= kind.memory, step, speed, seconds / 3600
    )


def _layout(recipe: Recipe, nodes: int, gpus_per_node: int) -> Layout:
    if nodes * gpus_per_node == 1:
        return Layout()
    own = Layout.of(recipe.strategy, gpus_per_node)
    kind = "ddp" if own.kind == "single" else own.kind
    return Layout(
        kind, gpus_per_node, nodes, own.hybrid, own.stage, own.offload_states, own.offload_weights, own.bucket
    )


def table(recipe: Recipe, kind: GpuKind, gpus: Sequence[int] = GPUS, *, images: tuple[int, int] | None = None) -> str:
    """Lines of at most 80 columns: one for each number of GPUs that the batch can be shared by, eight to a node."""
    counts = SETS.get(recipe.data.source.name)
    plan = Plan(recipe, recipe.model.num_classes or (counts[2] if counts else 1000))
    lines = [
        f"{recipe.variant} on {recipe.protocol}, {recipe.quantization.precision}, batch {recipe.data.batch_size}, "
        f"{recipe.optim.epochs} epochs",
        f"{kind.name}: {kind.memory / 2**30:.0f} GiB; {kind.source}",
        "",
        f"{'GPUs':>5} {'micro':>6} {'GiB each':>9} {'images/s':>9} {'each':>7} {'of one':>7} {'hours':>8} "
        f"{'GPU-hours':>10}",
    ]
    alone = None
    for number in gpus:
        if recipe.data.batch_size % number:
            lines.append(f"{number:>5}  a batch of {recipe.data.batch_size} cannot be shared equally")
            continue
        nodes = max(1, number // 8)
        row = forecast(recipe, kind, nodes, number // nodes, plan=plan, images=images)
        each = row.images_per_second / number
        alone = each if alone is None else alone
        full = "" if row.fits else "  does not fit"
        lines.append(
            f"{number:>5} {row.micro_batch:>6} {row.memory / 2**30:>9.1f} {row.images_per_second:>9,.0f} {each:>7,.0f} "
            f"{each / alone:>7.3f} {row.hours:>8.1f} {row.gpu_hours:>10.1f}{full}"
        )
    lines += ["", *_honesty(kind)]
    return "\n".join(lines)


def _honesty(kind: GpuKind) -> list[str]:
    """What of the table is measured."""
    if kind.measured:
        first = "The model is fitted to ViT-L/16 measured on one and two H200s; the rest is predicted."
    else:
        first = f"All predicted for {kind.name}: peaks by datasheet, times the share an H200 reaches."
    return [
        first,
        "Memory is counted on the model itself: within 5 % where it was measured.",
        f"Data: {CORES} cores a GPU at {IMAGES_A_CORE:.0f} images/s each. Details: docs/scaling.md.",
    ]


def main(words: Sequence[str]) -> int:
    """Print the table. `words`: ``--recipe R --gpu KIND [--gpus 1,2,8] [--images TRAIN EVAL] [key=value ...]``.

    Raises:
        UserError: unknown recipe, GPU or key.
    """
    from vit_efficient.recipe.load import load_recipe

    parser = argparse.ArgumentParser(prog="vit_efficient.submit --estimate", description=__doc__)
    parser.add_argument("--recipe", required=True, help="a variant or a complete recipe")
    parser.add_argument("--gpu", default="h200", help=", ".join(KINDS))
    parser.add_argument("--gpus", default="", metavar="1,2,8", help="numbers of GPUs; default 1 to 1024")
    parser.add_argument("--images", type=int, nargs=2, metavar=("TRAIN", "EVAL"), help="where the source is a folder")
    options, overrides = parser.parse_known_args([word for word in words if word != "--estimate"])
    if strange := [word for word in overrides if word.startswith("-")]:
        raise UserError(f"{strange[0]} is not known. See --help.")
    kind = gpu_kind(options.gpu)
    numbers = [word for word in options.gpus.split(",") if word]
    if strange := [word for word in numbers if not word.isdigit() or not int(word)]:
        raise UserError(f"--gpus {options.gpus}: {strange[0]!r} is no number of GPUs. Write --gpus 1,2,8.")
    gpus = [int(word) for word in numbers] or GPUS
    recipe = load_recipe(options.recipe, overrides).recipe
    if recipe.quantization.precision == "auto":
        precision = "fp16" if kind.name == "T4" else "bf16"
        quantization = recipe.quantization.model_copy(update={"precision": precision})
        recipe = recipe.model_copy(update={"quantization": quantization})
    print(table(recipe, kind, gpus, images=tuple(options.images) if options.images else None))
    return 0
