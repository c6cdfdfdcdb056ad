"""What a recipe's whole run takes on GPUs that need not be here: memory, and hours by the model of `scaling`."""

from __future__ import annotations

from dataclasses import dataclass

from vit_efficient.errors import UserError
from vit_efficient.machine import Machine
from vit_efficient.measure.choose import choose_strategy, usable
from vit_efficient.measure.gpus import GpuKind
from vit_efficient.measure.known import SETS, classes_of
from vit_efficient.measure.layout import Layout
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.scaling import DISK, IMAGES_A_CORE, StepTime, step_time
from vit_efficient.parallel.config import AutoConfig
from vit_efficient.recipe.schema import Recipe

CORES = 8  # that load data for each GPU: what recipes take at most


@dataclass(frozen=True)
class Forecast:
    """A whole run on one kind of GPU.

    Args:
        layout: how the model is spread.
        micro_batch: images that a device holds at once.
        checkpointing: whether blocks are recomputed.
        memory: bytes of each device.
        fits: whether it has them, with the part left free that `strategy: auto` leaves free.
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
    recipe: Recipe, machine: Machine, kind: GpuKind, *, plan: Plan | None = None, images: tuple[int, int] | None = None
) -> Forecast:
    """What a recipe's run takes.

    Args:
        recipe: its precision resolved, its strategy that of the machine (devices, nodes) or `auto`, which then decides
            as it would there.
        machine: a process of the run; its launch says how many there are.
        kind: of its GPUs.
        plan: of an earlier call with the same recipe but for its strategy, so that nothing is counted twice.
        images: to train and to evaluate with; None: by the name of the data's source.

    Raises:
        UserError: the batch cannot be divided; the number of images is not known.
    """
    devices, nodes = len(machine.gpus), 1
    if machine.launch is not None:
        devices, nodes = machine.launch.per_node, machine.launch.nodes
    world, batch = devices * nodes, recipe.data.batch_size
    if batch % world:
        raise UserError(f"data.batch_size is {batch}, which {world} GPUs cannot share equally.")
    train, evaluated = images or SETS.get(recipe.data.source.name, (0, 0, 0))[:2]
    if not train:
        raise UserError(f"How many images has data.source={recipe.data.source.name}? Give --images TRAIN EVAL.")
    plan = Plan(recipe, classes_of(recipe)) if plan is None else plan
    share = batch // world
    if isinstance(recipe.strategy, AutoConfig):
        choice = choose_strategy(recipe, machine, plan.num_classes, plan=plan)
        layout, micro, checkpointing = choice.layout, choice.micro_batch, choice.checkpointing
    else:
        layout, micro = Layout.of(recipe.strategy, devices), recipe.strategy.micro_batch or share
        checkpointing = recipe.strategy.checkpointing
    accumulate = share // micro
    needed = plan.estimate(layout, micro, checkpointing=checkpointing, accumulate=accumulate)
    _, work = plan.count(micro, checkpointing=checkpointing, narrow=layout.kind == "fsdp")
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
    fits = needed.total <= usable(kind.memory)
    return Forecast(layout, micro, checkpointing, needed.total, fits, step, speed, seconds / 3600)
