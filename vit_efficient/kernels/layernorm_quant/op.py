"""(Residual add +) LayerNorm (+ quantization) as operators: one pass over the row on a GPU.

`reference` is the definition and says what each returns. Inputs may be strided; what is returned is contiguous, which
the compiler is told. No gradients.

Shapes: M rows (all leading dimensions flattened: tokens), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.device import check_form, runs_triton
from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.layernorm_quant import reference


@torch.library.custom_op("vit_efficient::layernorm", mutates_args=())
def _layernorm(x_MD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    if runs_triton(x_MD) and x_MD.numel():
        from vit_efficient.kernels.layernorm_quant import triton

        return triton.layernorm(x_MD, weight_D, bias_D, eps, dtype)
    return reference.layernorm(x_MD, weight_D, bias_D, eps, dtype).contiguous()


@_layernorm.register_fake
def _(x_MD, weight_D, bias_D, eps, dtype):  # type: ignore[no-untyped-def]
    return x_MD.new_empty(x_MD.shape, dtype=dtype)


@torch.library.custom_op("vit_efficient::layernorm_quant", mutates_args=())
def _layernorm_quant(
    x_MD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, form: str, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_form(form, x_MD)
    if runs_triton(x_MD) and x_MD.numel():
        from vit_efficient.kernels.layernorm_quant import triton

        return triton.layernorm_quant(x_MD, weight_D, bias_D, eps, form, scale)
    codes, scales = reference.layernorm_quant(x_MD, weight_D, bias_D, eps, form, scale)
    return codes.contiguous(), scales.contiguous()


@_layernorm_quant.register_fake
def _(x_MD, weight_D, bias_D, eps, form, scale):  # type: ignore[no-untyped-def]
    return _empty_codes(x_MD, form)


@torch.library.custom_op("vit_efficient::add_layernorm", mutates_args=())
def _add_layernorm(
    x_MD: Tensor,
    residual_MD: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if runs_triton(x_MD) and x_MD.numel():
        from vit_efficient.kernels.layernorm_quant import triton

        return triton.add_layernorm(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, dtype)
    y_MD, new_MD = reference.add_layernorm(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, dtype)
    return y_MD.contiguous(), new_MD.contiguous()


@_add_layernorm.register_fake
def _(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, dtype):  # type: ignore[no-untyped-def]
    return x_MD.new_empty(x_MD.shape, dtype=dtype), residual_MD.new_empty(residual_MD.shape)


@torch.library.custom_op("vit_efficient::add_layernorm_quant", mutates_args=())
def _add_layernorm_quant(
    x_MD: Tensor,
    residual_MD: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    form: str,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_form(form, x_MD)
    if runs_triton(x_MD) and x_MD.numel():
        from vit_efficient.kernels.layernorm_quant import triton

        return triton.add_layernorm_quant(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, form, scale)
    codes, scales, new = reference.add_layernorm_quant(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, form, scale)
    return codes.contiguous(), scales.contiguous(), new.contiguous()


@_add_layernorm_quant.register_fake
def _(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, form, scale):  # type: ignore[no-untyped-def]
    return *_empty_codes(x_MD, form), residual_MD.new_empty(residual_MD.shape)


def _empty_codes(x_MD: Tensor, form: str) -> tuple[Tensor, Tensor]:
    codes = x_MD.new_empty(x_MD.shape, dtype=format_of(form).dtype)
    return codes, x_MD.new_empty((x_MD.shape[0], 1), dtype=torch.float32)


def layernorm(
    x: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """The norm of x (..., D), as `dtype` or that of x."""
    y_MD = _layernorm(x.reshape(-1, x.shape[-1]), weight_D, bias_D, eps, dtype or x.dtype)
    return y_MD.view(x.shape)


def layernorm_quant(
    x: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    form: str = "int8",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x, quantized.

    Args:
        x: (..., D), floating point.
        weight_D: of the norm, or None.
        bias_D: likewise.
        eps: added to the variance.
        form: of the codes: `int8`, `int4` or `fp8`.
        scale: one positive float32 on the device (static); None: each row's own (per token).

    Returns:
        codes (..., D), scales (..., 1) float32.

    Raises:
        UserError: fp8 codes on a GPU that has no units to multiply them.
    """
    codes, scales = _layernorm_quant(x.reshape(-1, x.shape[-1]), weight_D, bias_D, eps, form, scale)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def add_layernorm(
    x: Tensor,
    residual: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = residual + gamma * x`` in the residual's dtype, and its norm as `dtype` or that of x: (norm, r)."""
    width = x.shape[-1]
    flat = x.reshape(-1, width), residual.reshape(-1, width)
    y_MD, new_MD = _add_layernorm(*flat, gamma_D, weight_D, bias_D, eps, dtype or x.dtype)
    return y_MD.view(x.shape), new_MD.view(residual.shape)


def add_layernorm_quant(
    x: Tensor,
    residual: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    form: str = "int8",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``r = residual + gamma * x`` and its norm, quantized as by `layernorm_quant`: (codes, scales, r)."""
    width = x.shape[-1]
    flat = x.reshape(-1, width), residual.reshape(-1, width)
    codes, scales, new_MD = _add_layernorm_quant(*flat, gamma_D, weight_D, bias_D, eps, form, scale)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1), new_MD.view(residual.shape)
