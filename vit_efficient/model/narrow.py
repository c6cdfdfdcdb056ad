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
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


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


def widen(model: nn.Module) -> None:
    """Linear layers that were neither quantized nor given an adapter, the head above all, back to float32, in place."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith(".base_layer"):
            module.float()
