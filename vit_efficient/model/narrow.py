"""Making a model too large for the host's memory in float32: its linear weights in bfloat16 from the first moment on.

A 7-billion-weight model is 27 GB in float32 and 13.4 GB in bfloat16; each layer is then quantized for itself from a
float32 copy of that layer alone, and its bfloat16 weight is let go. Everything else (norms, embeddings, positions,
which are computed, not drawn) stays in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

LARGE = 2**20  # elements of a layer that is not drawn when weights take its place
HEADS = ("head", "head_dist")  # of timm's Vision Transformers; they are trained, and drawn in float32
# What draws, and `erfinv_`, by which timm makes a normal number of a uniform one.
DRAWS = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, init.uniform_, init.normal_, init.kaiming_uniform_}


@contextmanager
def narrow_linears(dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block, every `nn.Linear` but a classifier is cast to `dtype` when it becomes a part of another module.

    So no more than one of them is ever in float32. Initialisation comes after it and draws in `dtype`: in bfloat16 one
    uniform number of 500 or so is rounded to 1, of which timm makes the largest weight that it allows, 2. A classifier,
    which is trained, is not to begin so.

    Args:
        dtype: None: nothing is cast.
    """
    if dtype is None:
        yield
        return

    def cast(_parent: nn.Module, name: str, module: nn.Module | None) -> Any:
        if type(module) is not nn.Linear:
            return
        if name not in HEADS:
            module.to(dtype)
        elif module.weight.numel() >= LARGE:  # `Undrawn` may have left it without first values
            with torch.no_grad():
                module.weight.copy_(torch.randn(module.weight.shape) * 0.02)

    handle = register_module_module_registration_hook(cast)
    try:
        yield
    finally:
        handle.remove()


class Undrawn(TorchFunctionMode):
    """Within the block, large layers that are narrow are not drawn: for 7 billion numbers that takes minutes.

    They hold anything, or zero where whoever draws looks at what came out.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in DRAWS:
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs["tensor"]
        before = func is init.kaiming_uniform_  # a layer's own first values, before it is cast
        if not (before or tensor.dtype == torch.bfloat16) or tensor.numel() < LARGE:
            return func(*args, **kwargs)
        if before or func is Tensor.erfinv_:
            return tensor
        with torch.no_grad():
            return tensor.zero_()


def widen(model: nn.Module) -> None:
    """Linear layers that were neither quantized nor given an adapter, the head above all, back to float32, in place."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith(".base_layer"):
            module.float()
