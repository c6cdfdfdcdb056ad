"""vit_efficient: make a Vision Transformer small and fast without lying about its accuracy.

Importing this package loads nothing heavy and starts nothing: no CUDA, no global flags, no downloads. What it offers
to programs, `quantize_model`, is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_efficient.model.plain import quantize_model as quantize_model

__version__ = "0.1.0"
__all__ = ["__version__", "quantize_model"]

_HOMES = {"quantize_model": "vit_efficient.model.plain"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
