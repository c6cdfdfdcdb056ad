"""The norm of all gradients, and clipping by it: on shards as they are where gradients are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """`torch.nn.utils.get_total_norm`, with one sum over the ranks where it plans an operation for every `DTensor`.

    Args:
        parameters: those without a gradient are left out.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    return _norm(gradients, _local(gradients))


def _norm(gradients: Sequence[Any], local: Sequence[Tensor] | None) -> Tensor:
    if local is None:
        return get_total_norm(gradients)
    mesh, placements = gradients[0].device_mesh, gradients[0].placements
    squared = get_total_norm(local).to(mesh.device_type) ** 2
    for dimension, placement in enumerate(placements):
        if placement.is_shard():  # a copy has the whole of it
            dist.all_reduce(squared, group=mesh.get_group(dimension))
    return squared.sqrt()


def _local(gradients: Sequence[Any]) -> list[Tensor] | None:
    """This rank's parts themselves, no copies; None where gradients are not all sharded alike."""
    layouts = {(g.device_mesh, g.placements) if hasattr(g, "device_mesh") else None for g in gradients}
    if len(layouts) != 1 or None in layouts:
        return None
    return [g.to_local() for g in gradients]


@torch.no_grad()  # also, a `DTensor` hands out its local part at once
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, on shards where gradients are sharded.

    Args:
        parameters: those without a gradient are left out.
        most: the norm that gradients are scaled down to if theirs is larger.

    Returns:
        The norm before.
    """
    held = [p for p in parameters if p.grad is not None]
    gradients: list[Any] = [p.grad for p in held]
    local = _local(gradients)
    norm = _norm(gradients, local)
    if local is None:
        clip_grads_with_norm_(held, most, norm)
    else:
        torch._foreach_mul_(local, torch.clamp(most / (norm + 1e-6), max=1.0).to(local[0].device))
    return norm
