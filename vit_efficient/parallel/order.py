"""The one place where checkpointing and compilation are put on a model, in the order that works.

Recomputation wraps a block's forward first, then the block is compiled in place: the compiler sees the recomputation,
and neither changes a parameter's name. Sharding, where a strategy has it, comes after both. Nothing here knows what a
Vision Transformer is: the caller hands over the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


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
