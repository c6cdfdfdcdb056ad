"""The one place where checkpointing, compilation and sharding are put on a model, in the order that works.

Recomputation wraps a block's forward first, then the block is compiled in place, then its parameters are sharded: the
compiler sees the recomputation, both run on gathered parameters, and nothing changes a parameter's name. Nothing here
knows what a Vision Transformer is: the caller hands over the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def _recomputed(forward: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not module.training:  # nothing is kept for a backward pass, so nothing need be recomputed
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def prepare_blocks(blocks: Iterable[nn.Module], *, checkpointing: bool, compile: bool) -> None:
    """Put recomputation, then compilation, on each block, in place.

    Args:
        blocks: modules that run one after the other and hold most of the work.
        checkpointing: keep only each block's input; run the block again in the backward pass.
        compile: ``torch.compile`` each block by itself, so that equal blocks share one compilation.
    """
    for block in blocks:
        if checkpointing:
            block.forward = _recomputed(block.forward, block)
        if compile:
            block.compile()


def shard(
    model: nn.Module,
    blocks: Collection[nn.Module],
    mesh: DeviceMesh,
    *,
    gather: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """Spread the parameters of a model over a mesh of devices by FSDP2, in place: each block for itself, then the rest.

    Call it last: recomputation and compilation are on the blocks by then, and stay inside what is gathered for a block.
    Every process must hold the same model, on the CPU or already on its device.

    Nothing stays gathered after a forward pass, the root's own parameters neither: whoever changes parameters between
    two passes (an average put in their place for an evaluation) changes what the next one computes with.

    Args:
        model: its parameters become `DTensor`s; buffers stay whole on every device.
        blocks: modules of ``model`` that run one after the other and hold most of the weights.
        mesh: (shard,), or (replicate, shard) for copies that are each sharded.
        gather: dtype in which the blocks' floating-point parameters are gathered and computed with, for half the
            traffic; None: their own. Gradients are summed in float32, and integers (packed bytes) stay as they are.
            Parameters outside the blocks, embeddings for example, and the residual stream keep their dtype.
        offload: keep parameters, gradients and optimizer states in the CPU's memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
    offloading = CPUOffloadPolicy(pin_memory=on_gpu) if offload else OffloadPolicy()
    narrow = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    own = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        block.to(device)  # one at a time: the whole model need not fit; by `to`, since packed weights have scales
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=narrow, offload_policy=offloading)
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=own, offload_policy=offloading)
