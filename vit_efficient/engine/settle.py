"""`strategy: auto` on GPUs: what fits their memory is taken, and said, before the rest of a recipe is resolved."""

from __future__ import annotations

from pydantic import TypeAdapter

from vit_efficient.errors import CapabilityError
from vit_efficient.machine import Machine
from vit_efficient.measure.choose import choose_strategy
from vit_efficient.measure.known import classes_of
from vit_efficient.parallel.config import AutoConfig, StrategyConfig
from vit_efficient.recipe.compat import resolve
from vit_efficient.recipe.schema import Recipe


def settle_strategy(recipe: Recipe, machine: Machine) -> tuple[Recipe, list[str]]:
    """Put the simplest strategy that fits in the place of `auto`.

    Under srun or torchrun the processes are those that were started, and the rest is decided, by each of them for
    itself and alike. On a CPU nothing is estimated, and `compat.resolve` decides.

    Returns:
        The recipe, and a line for each thing tried.
    """
    if not isinstance(recipe.strategy, AutoConfig):
        return recipe, []
    if not machine.gpus or recipe.strategy.accelerator == "cpu":
        return recipe, []
    precision = resolve(recipe, machine)[0].quantization
    try:
        known = recipe.model_copy(update={"quantization": precision})
        choice = choose_strategy(known, machine, classes_of(recipe))
    except CapabilityError as error:
        return recipe, [f"strategy.auto: memory cannot be estimated, so nothing is saved on: {error}"]
    given = recipe.strategy.model_dump(exclude={"name"})
    strategy = TypeAdapter(StrategyConfig).validate_python({**given, **choice.settings()})
    return recipe.model_copy(update={"strategy": strategy}), [f"strategy.auto: {line}" for line in choice.reasons]
