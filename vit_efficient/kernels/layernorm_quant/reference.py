"""LayerNorm that ends in codes, in plain PyTorch: this file is the definition, every faster form is held against it.

The one order of operations; every step is rounded to float32, except where a dtype is named:

1. With a residual: ``r = residual + gamma * x`` (`gamma` is the layer scale, a number a column, or left out), rounded
   to the residual's dtype: that is what is stored, and what the norm sees.
2. ``c = r - mean(r)``; ``y = (c * (1 / sqrt(mean(c * c) + eps))) * weight + bias`` (Ba et al., arXiv:1607.06450).
3. y is quantized as it is, not rounded to 16 bits before (`quantize.reference`), or cast to a dtype.

The two means are sums in an order that a library chooses, so y is compared within float32 rounding, and codes of
values that lie next to the middle between two codes may differ by one.

Shapes: M rows (all leading dimensions flattened: tokens), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.quantize import reference as quantization


def add(x: Tensor, residual: Tensor, gamma_D: Tensor | None = None) -> Tensor:
    """Step 1: the new residual, in the dtype of the old one."""
    x = x.to(torch.float32)
    if gamma_D is not None:
        x = gamma_D.to(torch.float32) * x
    return (residual.to(torch.float32) + x).to(residual.dtype)


def norm(x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float) -> Tensor:
    """Step 2, in float32."""
    x = x.to(torch.float32)
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    y = centred * (1 / torch.sqrt(variance + eps))
    if weight_D is not None:
        y = y * weight_D.to(torch.float32)
    return y if bias_D is None else y + bias_D.to(torch.float32)


def layernorm(x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm alone: (..., D) in `dtype`."""
    return norm(x, weight_D, bias_D, eps).to(dtype)


def layernorm_quant(
    x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, form: str, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (..., D) and scales (..., 1) of the norm of x; `form` and `scale` as `quantize` takes them."""
    return quantization.quantize(norm(x, weight_D, bias_D, eps), form, scale)


def add_layernorm(
    x: Tensor,
    residual: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The norm of the sum, in `dtype`, and the sum."""
    new = add(x, residual, gamma_D)
    return layernorm(new, weight_D, bias_D, eps, dtype), new


def add_layernorm_quant(
    x: Tensor,
    residual: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    form: str,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of the norm of the sum, and the sum."""
    new = add(x, residual, gamma_D)
    return *layernorm_quant(new, weight_D, bias_D, eps, form, scale), new
