"""Quantization of rows on its own, as an operator: in one pass on a GPU, by the definition elsewhere.

What operators return is contiguous, whatever their inputs' strides: the compiler is told so.

Shapes: M rows (all leading dimensions flattened), K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.device import check_form, require_fp8, runs_triton
from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.quantize import reference


@torch.library.custom_op("vit_efficient::quantize", mutates_args=())
def _quantize(
    x_MK: Tensor,
    form: str,
    scale: Tensor | None,
    shift_K: Tensor | None,
    smooth_K: Tensor | None,
    reciprocal_K: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_form(form, x_MK)
    if runs_triton(x_MK) and x_MK.numel():
        from vit_efficient.kernels.quantize import triton

        return triton.quantize(x_MK, form, scale, shift_K, smooth_K, reciprocal_K)
    codes, scales = reference.quantize(x_MK, form, scale, shift_K, smooth_K)
    return codes.contiguous(), scales.contiguous()


@_quantize.register_fake
def _(x_MK, form, scale, shift_K, smooth_K, reciprocal_K):  # type: ignore[no-untyped-def]
    codes = x_MK.new_empty(x_MK.shape, dtype=format_of(form).dtype)
    return codes, x_MK.new_empty((x_MK.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("vit_efficient::quantize_clipping", mutates_args=())
def quantize_clipping(x_MK: Tensor, form: str, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` of a matrix to integers with a given scale, and `reference.beyond` in the same pass: (M, K) bool."""
    if runs_triton(x_MK) and x_MK.numel():
        from vit_efficient.kernels.quantize import triton

        return triton.quantize_clipping(x_MK, form, scale)
    codes, scales = reference.quantize(x_MK, form, scale)
    return codes.contiguous(), scales.contiguous(), reference.beyond(x_MK, form, scale).contiguous()


@quantize_clipping.register_fake
def _(x_MK: Tensor, form: str, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = x_MK.new_empty(x_MK.shape, dtype=format_of(form).dtype)
    scales = x_MK.new_empty((x_MK.shape[0], 1), dtype=torch.float32)
    return codes, scales, x_MK.new_empty(x_MK.shape, dtype=torch.bool)


@torch.library.custom_op("vit_efficient::dequantize", mutates_args=())
def dequantize(codes_MK: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize` of a matrix, in one pass on a GPU: (M, K) in `dtype`.

    Args:
        codes_MK: int8 or e4m3, of up to `rows.WIDEST` columns.
        scales: (M, 1) or (1, 1) float32.
    """
    if runs_triton(codes_MK) and codes_MK.numel():
        if codes_MK.dtype != torch.int8:
            require_fp8(codes_MK)
        from vit_efficient.kernels.quantize import triton

        return triton.dequantize(codes_MK, scales, dtype)
    return reference.dequantize(codes_MK, scales, dtype).contiguous()


@dequantize.register_fake
def _(codes_MK: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes_MK.new_empty(codes_MK.shape, dtype=dtype)


def reciprocal_of(smooth_K: Tensor | None, at_hand: Tensor | None) -> Tensor | None:
    """What kernels divide by `smooth_K` with."""
    return smooth_K.reciprocal() if smooth_K is not None and at_hand is None else at_hand


def quantize(
    x: Tensor,
    form: str = "int8",
    scale: Tensor | None = None,
    shift_K: Tensor | None = None,
    smooth_K: Tensor | None = None,
    reciprocal_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each row; no gradient.

    Args:
        x: (..., K), floating point, strided as it may be.
        form: of the codes: `int8`, `int4` (within +-7, a byte each) or `fp8`.
        scale: one positive float32 on the device (static); None: each row's own (per token).
        shift_K: (K,) float32, subtracted from x before; or None.
        smooth_K: (K,) positive float32, by which x is divided after that; or None.
        reciprocal_K: ``1 / smooth_K``, if it is at hand; else it is made here. Results do not depend on it.

    Returns:
        codes (..., K) and scales (..., 1) float32, both contiguous.

    Raises:
        UserError: fp8 codes on a GPU that has no units to multiply them.
    """
    vectors = shift_K, smooth_K, reciprocal_of(smooth_K, reciprocal_K)
    codes, scales = _quantize(x.reshape(-1, x.shape[-1]), form, scale, *vectors)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)
