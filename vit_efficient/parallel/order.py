"""The one place where checkpointing, compilation and sharding are put on a model, in the order that works.

Recomputation wraps a block's forward first, then the block is compiled in place, then its parameters are sharded: the
compiler sees the recomputation, both run on gathered parameters, and nothing changes a parameter's name. Nothing here
knows what a Vision Transformer is: the caller hands over the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vit_efficient.parallel.packed import bytes_as_they_are

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# Bytes of parameters in a unit, which is gathered and let go at once. Every unit costs the host time (hooks, copies,
# collectives): a step of 24 blocks, tiny ones in two CPU processes, 91 ms of it, of 12 pairs 59, without sharding 10.
UNIT = 2**28
KEPT = 2**30  # bytes of all blocks as they are gathered, up to which they stay so until the backward pass
CHOSEN = "kept"  # attribute of modules that choose samples before a pass: recomputation needs what it was then
MOST = 4  # blocks in a unit, so that small models are sharded in several too


def units(blocks: Sequence[nn.Module], size: int = UNIT) -> list[list[nn.Module]]:
    """Neighbouring blocks that FSDP2 gathers together: as few as hold `size` bytes of parameters, and at most MOST."""
    largest = max((sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks), default=0)
    together = min(MOST, max(1, -(-size // largest))) if largest else 1
    return [list(blocks[first : first + together]) for first in range(0, len(blocks), together)]


def gathered(block: nn.Module, dtype: torch.dtype | None) -> int:
    """Bytes of a block's parameters as FSDP2 gathers them: in `dtype`, but for integers; None: in their own."""
    return sum(
        p.numel() * (dtype.itemsize if dtype is not None and p.is_floating_point() else p.element_size())
        for p in block.parameters()
    )


def stays_gathered(blocks: Iterable[nn.Module], dtype: torch.dtype | None) -> bool:
    """Whether blocks are small enough to stay gathered from a forward pass to its backward pass."""
    return sum(gathered(block, dtype) for block in blocks) <= KEPT


def _recomputed(forward: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    choosing = [part for part in module.modules() if hasattr(part, CHOSEN)]

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not module.training:  # nothing is kept for a backward pass, so nothing need be recomputed
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling() or not choosing:  # a program recomputes from its inputs, and these are some
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        had = [getattr(part, CHOSEN) for part in choosing]
        again = partial(_with, choosing, had)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()), **kwargs)

    return run


@contextmanager
def _with(parts: Sequence[nn.Module], chosen: Sequence[Any]) -> Iterator[None]:
    """What the parts chose for an earlier pass, once more."""
    now = [getattr(part, CHOSEN) for part in parts]
    try:
        for part, value in zip(parts, chosen, strict=True):
            setattr(part, CHOSEN, value)
        yield
    finally:
        for part, value in zip(parts, now, strict=True):
            setattr(part, CHOSEN, value)


def prepare_blocks(blocks: Iterable[nn.Module], *, checkpointing: bool, compile: bool) -> None:
    """Put recomputation, then compilation, on each block, in place.

    Args:
        blocks: modules that run one after the other and hold most of the work.
        checkpointing: keep only each block's input; run the block again in the backward pass.
        compile: ``torch.compile`` each block by itself, so that equal blocks share one compilation.
    """
    if compile:
        # Under DDP the compiler would cut each program where a bucket is full, so that its gradients leave early. A
        # block's program ends soon enough, and whole it is faster: 132 ms a step of ViT-L in 25 MiB, 116 uncut.
        torch._dynamo.config.optimize_ddp = False
    for block in blocks:
        if checkpointing:
            block.forward = _recomputed(block.forward, block)
        if compile:
            block.compile()


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    gather: torch.dtype | None = None,
    offload: bool = False,
    unit: int = UNIT,
) -> None:
    """Spread the parameters of a model over a mesh of devices by FSDP2, in place: `units` of blocks, then the rest.

    Call it last: recomputation and compilation are on the blocks by then, and stay inside what is gathered for a block.
    Every process must hold the same model, on the CPU or already on its device.

    Nothing stays gathered after a step or an evaluation's forward pass, the root's own parameters neither: whoever
    changes parameters between two (an average put in their place) changes what the next one computes with. Between a
    training step's forward and backward pass small models do (`parallel/keeping.py`).

    Args:
        model: its parameters become `DTensor`s; buffers stay whole on every device.
        blocks: modules of ``model`` that run one after the other and hold most of the weights.
        mesh: (shard,), or (replicate, shard) for copies that are each sharded.
        gather: dtype in which the blocks' floating-point parameters are gathered and computed with, for half the
            traffic; None: their own. Gradients are summed in float32, and integers (packed bytes) stay as they are.
            Parameters outside the blocks, embeddings for example, and the residual stream keep their dtype.
        offload: keep parameters, gradients and optimizer states in the CPU's memory.
        unit: bytes of parameters that are gathered at once; 0: a block.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    from vit_efficient.parallel.keeping import Keeping

    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device(mesh.device_type)
    offloading = CPUOffloadPolicy(pin_memory=on_gpu) if offload else OffloadPolicy()
    narrow = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    own = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    keep, parts = not offload and stays_gathered(blocks, gather), units(blocks, unit)
    for together in parts:
        for block in together:
            block.to(device)  # unit by unit: the whole model need not fit; by `to`, since packed weights have scales
        with bytes_as_they_are():
            fully_shard(together, mesh=mesh, reshard_after_forward=True, mp_policy=narrow, offload_policy=offloading)
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for now, ahead in pairwise(parts):  # or it would be gathered no sooner than the host arrives there
        cast(FSDPModule, now[0]).set_modules_to_forward_prefetch([cast(FSDPModule, ahead[0])])
    if keep:
        model.register_forward_pre_hook(Keeping([cast(FSDPModule, together[0]) for together in parts]))
    with bytes_as_they_are():
        fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=own, offload_policy=offloading)
