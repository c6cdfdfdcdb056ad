"""Parameter groups, optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vit_efficient.errors import CapabilityError
from vit_efficient.model.sharded_adamw import ShardedAdamW
from vit_efficient.recipe.schema import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig, lr: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay.

    Weight decay spares vectors (norms, biases, layer scales), what the model itself excludes (position embeddings,
    class token) and learned ranges, which are logarithms: 0 means nothing there. Block ``i`` of ``L`` learns at
    ``lr * layer_decay ** (L - i)`` (BEiT, appendix: layer-wise decay).

    Args:
        model: a timm model; frozen parameters are left out.
        config: weight decay and layer decay.
        lr: peak rate of the last layer.

    Returns:
        Groups for a torch optimizer, each with its ``lr`` and ``weight_decay``.
    """
    exclude: set[str] = getattr(model, "no_weight_decay", set)() | learned_ranges(model).keys()
    groups = param_groups_layer_decay(
        model, weight_decay=config.weight_decay, no_weight_decay_list=exclude, layer_decay=config.layer_decay
    )
    for group in groups:
        group["lr"] = lr * group.pop("lr_scale")
    return groups


def learned_ranges(model: nn.Module) -> dict[str, nn.Parameter]:
    """Quantization ranges that are trained, by name: what modules list in an attribute of this function's name."""
    own = {
        f"{name}.{parameter}".lstrip("."): getattr(module, parameter)
        for name, module in model.named_modules()
        for parameter in getattr(module, "learned_ranges", ())
    }
    return {name: parameter for name, parameter in own.items() if parameter is not None}


def build_optimizer(model: nn.Module, config: OptimConfig, lr: float, *, scaled: bool = False) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`; ``adamw8bit`` keeps its moments in 8 bits (bitsandbytes).

    Args:
        model: its trainable parameters are optimized.
        config: which optimizer, and its settings.
        lr: peak rate.
        scaled: whether gradients come scaled (fp16), to be unscaled before they are clipped.
    """
    groups = parameter_groups(model, config, lr)
    if config.name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise CapabilityError(
                "optim.name: adamw8bit needs the package bitsandbytes, which cannot be imported here "
                f"({error}). Install it, or take `optim.name=adamw`."
            ) from error
        return AdamW8bit(groups, lr=lr, betas=config.betas)
    # One fused kernel a step on GPUs; on a CPU the plain loop over few, small tensors is as fast.
    # Under fp16 the fused kernel would unscale inside the step, after the clipping.
    fused = next(model.parameters()).is_cuda and not scaled
    return ShardedAdamW(groups, lr=lr, betas=config.betas, fused=fused)


def warmup_cosine(warmup: int, total: int, floor: float) -> Callable[[int], float]:
    """Factor of the peak rate at each optimizer step.

    Args:
        warmup: steps of linear rise; the first step already has rate ``1 / warmup``.
        total: all steps; the cosine reaches ``floor`` at the last one.
        floor: final rate as a share of the peak.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def build_schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up and cosine, counted in optimizer steps (which the manifest gives: images / batch size)."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total)
    return LambdaLR(optimizer, warmup_cosine(warmup, total, config.min_lr / config.lr))
