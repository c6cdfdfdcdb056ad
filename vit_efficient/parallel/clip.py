"""Clipping by the norm of all gradients, on shards as they are where gradients are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, with one sum over the ranks where it plans an operation for every `DTensor`.

    Args:
        parameters: those without a gradient are left out.
        most: the norm that gradients are scaled down to if theirs is larger.

    Returns:
        The norm before.
    """
    held = [p for p in parameters if p.grad is not None]
    gradients: list[Any] = [p.grad for p in held]
    layouts = {(g.device_mesh, g.placements) if hasattr(g, "device_mesh") else None for g in gradients}
    layout = next(iter(layouts), None)
    if len(layouts) != 1 or layout is None:
        return clip_grad_norm_(held, most)
    mesh, placements = layout
    local = [g.to_local() for g in gradients]  # views, scaled in place below
    squared = get_total_norm(local).to(mesh.device_type) ** 2
    for dimension, placement in enumerate(placements):
        if placement.is_shard():  # a copy has the whole of it
            dist.all_reduce(squared, group=mesh.get_group(dimension))
    norm = squared.sqrt()
    torch._foreach_mul_(local, torch.clamp(most / (norm + 1e-6), max=1.0).to(local[0].device))
    return norm
