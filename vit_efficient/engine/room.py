"""Before a job is submitted: whether a recipe fits the GPUs that the cluster is said to have."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vit_efficient.errors import CapabilityError, Problem
from vit_efficient.machine import Machine
from vit_efficient.measure.choose import choose_strategy, usable
from vit_efficient.measure.gpus import KINDS, kind_of
from vit_efficient.measure.known import classes_of
from vit_efficient.measure.layout import Layout
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.units import size
from vit_efficient.parallel.config import AutoConfig
from vit_efficient.recipe.compat import resolve
from vit_efficient.recipe.schema import Recipe


@dataclass(frozen=True)
class Room:
    """What came of it: `problem` where it does not fit; `note`, a line for a person, where there is more to say."""

    problem: Problem | None = None
    note: str = ""


def find_room(recipe: Recipe, machine: Machine, gpu_type: str | None) -> Room:
    """Hold a recipe's estimated memory against a kind of GPU.

    Args:
        recipe: which `compat.check` finds nothing wrong with.
        machine: what a process of the job will find; the memory of its GPUs is not looked at.
        gpu_type: as the cluster names them; None: it was not said.

    Raises:
        UserError: as `build_model` does.
    """
    kind = kind_of(gpu_type) if gpu_type else None
    if gpu_type is None:
        return Room(note="memory was not checked: site.gpu_type does not say which GPUs these are")
    if kind is None:
        known_kinds = ", ".join(KINDS)
        return Room(
            note=f"memory was not checked: that of site.gpu_type {gpu_type} is not known, only of {known_kinds}"
        )
    gpu = f"{kind.name} of {size(kind.memory)} (site.gpu_type {gpu_type})"
    known = replace(machine, gpus=tuple(replace(one, memory=int(kind.memory)) for one in machine.gpus))
    concrete = resolve(recipe, known)[0]
    classes = classes_of(recipe)
    plan = Plan(concrete, classes)
    try:
        if isinstance(recipe.strategy, AutoConfig):
            asked = recipe.model_copy(update={"quantization": concrete.quantization})
            choice = choose_strategy(asked, known, classes, plan=plan)
            line = f"on the {gpu}, strategy.auto takes {choice.reasons[-1]}"
            return Room(note=line) if choice.fits else Room(_too_much("strategy", "auto", choice.needed, gpu))
        layout, micro = Layout.of(concrete.strategy), concrete.strategy.micro_batch
        assert micro is not None, "resolve() makes the micro-batch concrete"
        accumulate = max(1, recipe.data.batch_size // (micro * layout.world))
        checkpointing = concrete.strategy.checkpointing
        needed = plan.estimate(layout, micro, checkpointing=checkpointing, accumulate=accumulate).total
    except CapabilityError as error:
        return Room(note=f"memory was not checked: {error}")
    if needed > kind.memory:
        return Room(_too_much("strategy.micro_batch", str(micro), needed, gpu))
    tight = ", which leaves less free than the estimate may be wrong by" if needed > usable(kind.memory) else ""
    return Room(note=f"about {size(needed)} of memory, on the {gpu}{tight}")


def _too_much(key: str, value: str, needed: int, gpu: str) -> Problem:
    otherwise = "Lower it, set strategy.checkpointing=true, or leave both to strategy=auto"
    if key == "strategy":
        otherwise = "Nothing that it tries fits: take a smaller image or model, or GPUs with more memory"
    return Problem(key, f"is {value}, and needs about {size(needed)} on the {gpu}. {otherwise}")
