"""What FSDP2 does not work with, why, and what to take instead; a part of `recipe.compat`'s table.

Each was tried with two processes. What is not here was tried too, and trains as one process does: float layers, int8
and fp8 QAT with dynamic, static and learned ranges, LoRA, nf4, fp4 and LLM.int8 bases with adapters, distillation.
"""

from __future__ import annotations

from vit_efficient.errors import Problem
from vit_efficient.parallel.config import FsdpConfig
from vit_efficient.recipe.schema import Recipe


def fsdp_problems(recipe: Recipe) -> list[Problem]:
    """Every reason why a resolved recipe with ``strategy: fsdp`` cannot run, and what only that strategy has."""
    strategy = recipe.strategy
    if not isinstance(strategy, FsdpConfig):
        return _only_fsdp(recipe)
    problems = []
    if recipe.quantization.precision == "fp16":
        message = (
            "is fp16, and the scaling of its loss is not carried to sharded gradients. Take strategy=ddp or "
            "strategy=deepspeed, or quantization.precision=bf16 on GPUs from sm_80 on"
        )
        problems.append(Problem("quantization.precision", message))
    if recipe.optim.name == "adamw8bit":
        message = (
            "is adamw8bit, and bitsandbytes' optimizers do not step sharded parameters. Take adamw, whose states are "
            "sharded, or strategy=ddp"
        )
        problems.append(Problem("optim.name", message))
    if strategy.shard == "hybrid" and strategy.nodes == 1:
        message = "is hybrid, which keeps a copy of the model on each node, and strategy.nodes is 1. Take full"
        problems.append(Problem("strategy.shard", message))
    return problems


def _only_fsdp(recipe: Recipe) -> list[Problem]:
    if not recipe.checkpoint.sharded:
        return []
    message = (
        f"is true, and under strategy={recipe.strategy.name} a checkpoint is one file. Take strategy=fsdp, or false"
    )
    return [Problem("checkpoint.sharded", message)]
