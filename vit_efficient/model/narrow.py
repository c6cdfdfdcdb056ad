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

LARGE = 2**20  # elements of a tensor that are not drawn when weights take their place
# What draws; with timm's `trunc_normal_`, which is a uniform number's `erfinv_`.
DRAWS = {
    Tensor.uniform_, Tensor.normal_, Tensor.erfinv_,
    init.uniform_, init.normal_, init.trunc_normal_, init.xavier_uniform_, init.kaiming_uniform_,
}  # fmt: skip


@contextmanager
def narrow_linears(dtype: torch.dtype | None) -> Iterator[None]:
    """Within the block, every `nn.Linear` is cast to `dtype` when it becomes a part of another module.

    So no more than one of them is ever in float32. Initialisation comes after it and draws in `dtype`.

    Args:
        dtype: None: nothing is cast.
    """
    if dtype is None:
        yield
        return

    def cast(_parent: nn.Module, _name: str, module: nn.Module | None) -> Any:
        if type(module) is nn.Linear:
            module.to(dtype)

    handle = register_module_module_registration_hook(cast)
    try:
        yield
    finally:
        handle.remove()


class Undrawn(TorchFunctionMode):
    """Within the block, large tensors are not drawn and hold anything: drawing 7 billion numbers takes minutes.

    Whoever makes a model so gives all of them a value before it is used: `draw` for what no weights are for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS and (tensor := args[0] if args else kwargs["tensor"]).numel() >= LARGE:
            return tensor
        return func(*args, **kwargs)


def draw(weight: Tensor) -> None:
    """Initial values of a linear layer of a Vision Transformer, as timm draws them, in place.

    Drawn in float32 whatever the layer has: in bfloat16 one uniform number of 500 or so is rounded to 1, and becomes
    the largest weight that timm allows, 2, a hundred times the standard deviation.
    """
    with torch.no_grad():
        weight.copy_(init.trunc_normal_(torch.empty(weight.shape), std=0.02))


def widen(model: nn.Module) -> None:
    """Linear layers that were neither quantized nor given an adapter, the head above all, back to float32, in place."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith(".base_layer"):
            module.float()
