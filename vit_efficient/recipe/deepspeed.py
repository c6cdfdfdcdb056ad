"""What DeepSpeed does not work with, why, and what to take instead; a part of `recipe.compat`'s table."""

from __future__ import annotations

from vit_efficient.errors import Problem
from vit_efficient.machine import Machine
from vit_efficient.parallel.config import DeepspeedConfig
from vit_efficient.recipe.schema import Recipe


def deepspeed_problems(recipe: Recipe, machine: Machine) -> list[Problem]:
    """Every reason why a resolved recipe with ``strategy: deepspeed`` cannot run; empty for other strategies."""
    strategy = recipe.strategy
    if not isinstance(strategy, DeepspeedConfig):
        return []
    return [*needs_gpus(strategy), *_package(machine), *_options(strategy), *_optimizer(recipe), *_ranges(recipe)]


def deepspeed_caveats(recipe: Recipe) -> list[str]:
    """What disappoints although it runs, for a resolved recipe."""
    strategy = recipe.strategy
    if not isinstance(strategy, DeepspeedConfig) or strategy.stage < 3 or strategy.checkpointing:
        return []
    if recipe.quantization.precision == "fp32":
        return []
    return [
        "ZeRO 3 spreads float32 weights, and autograd keeps a half-precision copy of those that were computed with "
        "until the backward pass; strategy.checkpointing=true keeps one block's at a time"
    ]


def needs_gpus(strategy: DeepspeedConfig) -> list[Problem]:
    """Lightning runs DeepSpeed on GPUs only."""
    if strategy.accelerator == "gpu":
        return []
    message = "is deepspeed, which runs on GPUs, and strategy.accelerator is cpu. Take strategy=ddp or strategy=fsdp"
    return [Problem("strategy.name", message)]


def _package(machine: Machine) -> list[Problem]:
    if machine.version("deepspeed") is not None:
        return []
    message = (
        "is deepspeed, and the package deepspeed is not installed. `pip install -e '.[deepspeed]'` in the "
        "checkout, or take strategy=fsdp, which shards the same and needs no package"
    )
    return [Problem("strategy.name", message)]


def _options(strategy: DeepspeedConfig) -> list[Problem]:
    problems = []
    if strategy.offload_parameters and strategy.stage < 3:
        message = f"is true, and ZeRO {strategy.stage} keeps every parameter on every GPU. Take strategy.stage=3"
        problems.append(Problem("strategy.offload_parameters", message))
    if strategy.compile and strategy.stage == 3:
        message = (
            "is true, and ZeRO 3 gathers the weights of each layer in hooks at which the compiler has to stop, so that "
            "a block falls to pieces. Take strategy.compile=false, strategy.stage=2, or strategy=fsdp"
        )
        problems.append(Problem("strategy.compile", message))
    return problems


def _optimizer(recipe: Recipe) -> list[Problem]:
    if recipe.optim.name != "adamw8bit":
        return []
    message = (
        "is adamw8bit, whose blocks of 8-bit moments cross the borders of parameters in ZeRO's flat partitions, so "
        "that no checkpoint could name them. Take optim.name=adamw (ZeRO spreads its moments over the devices), or "
        "strategy=ddp"
    )
    return [Problem("optim.name", message)]


def _ranges(recipe: Recipe) -> list[Problem]:
    if not getattr(recipe.quantization, "freeze_ranges", 0.0):
        return []
    message = (
        "holds ranges by dropping their gradients, which ZeRO has put into its partitions by then. Take "
        "quantization.freeze_ranges=0, or strategy=ddp or strategy=fsdp"
    )
    return [Problem("quantization.freeze_ranges", message)]
