"""Whole tensors of sharded ones and back: what makes a checkpoint independent of how many processes wrote it.

A sharded tensor is a `DTensor`. The functions here take trees (dicts and lists) in which some leaves are; every process
must call them with the same tree, since gathering is a collective operation.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from vit_efficient.parallel import zero
from vit_efficient.parallel.hooks import drop_hooks


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def kept(parameter: Tensor) -> Tensor:
    """What a process holds of a parameter between two steps, sharing its memory: a `DTensor` under FSDP2, ZeRO 3's flat
    part, or the parameter itself."""
    return zero.part(parameter) if zero.is_partitioned(parameter) else parameter.detach()


def joined(values: Tensor, like: Tensor) -> Tensor:
    """The whole tensor, on rank 0, of what was made of ``kept(like)`` where that is ZeRO 3's; else ``values``."""
    if not zero.is_partitioned(like):
        return values
    full = zero.gather_part(values, like)
    return full.cpu() if dist.get_rank() == 0 else torch.empty(0)


def whole(tensor: DTensor) -> Tensor:
    """The full tensor, in every process, on the device of the processes' collectives."""
    device = tensor.device_mesh.device_type
    if tensor.device.type != device:  # offloaded: the parts lie in the CPU's memory, and NCCL gathers a GPU's
        tensor = tensor.to(device)  # type: ignore[assignment]
    return tensor.full_tensor().detach()


def gather(tree: Any) -> Any:
    """The tree with whole tensors, in the CPU's memory, on rank 0; on the others None takes a sharded tensor's place.

    Tensors that are not sharded are left as they are. One tensor is gathered at a time, so that a device need never
    hold more than the largest.
    """
    if isinstance(tree, DTensor):
        full = whole(tree)
        return full.cpu() if dist.get_rank() == 0 else None
    if isinstance(tree, dict):
        return {key: gather(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gather(value) for value in tree)
    return tree


def spread(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as ``like`` is; itself where ``like`` is not sharded.

    Nothing is sent: each process takes its own part.
    """
    if zero.is_partitioned(like):
        return full if full.shape == zero.part(like).shape else zero.part_of(like, full)
    if not isinstance(like, DTensor) or isinstance(full, DTensor):
        return full
    mesh = like.device_mesh
    sharded = distribute_tensor(full.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return sharded.to(like.device)


@torch.no_grad()
def copy(target: Tensor, source: Tensor) -> None:
    """Write a whole or sharded tensor into ``target``, sharded or not, in place."""
    if zero.is_partitioned(target):
        zero.write(target, spread(source, target))
    else:
        local(target).copy_(local(spread(source, target)))


def is_sharded(model: nn.Module) -> bool:
    """Whether this process has only parts of some parameters."""
    return any(isinstance(p, DTensor) or zero.is_partitioned(p) for p in model.parameters())


def unshard(model: nn.Module) -> None:
    """Make the model that `order.shard` or ZeRO 3 spread a plain one again, in place, whole in rank 0's memory.

    In the other processes the parameters become empty. A layer whose parameter is more than its numbers (packed weights
    and their scales) is told by its `retie`.
    """
    zero.join(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward pass without a backward pass has left gathered
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                full = gather(parameter)
                empty = torch.empty(0, dtype=parameter.dtype)
                made = nn.Parameter(empty if full is None else full, requires_grad=parameter.requires_grad)
                setattr(module, name, made)
        if dist.get_rank() == 0 and hasattr(module, "retie"):
            cast(Any, module).retie()
        if isinstance(module, FSDPModule):  # which has no way back of its own
            module.__class__ = type(module).__bases__[1]
            drop_hooks(module, "torch.distributed", "vit_efficient.parallel.keeping")
            module._state_dict_pre_hooks.clear()
