"""Quantization of rows in plain PyTorch: one entry to the definitions of the integer and the fp8 linear layer.

Shapes: M rows (all leading dimensions flattened), K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.fp8_linear import reference as fp8
from vit_efficient.kernels.int8_linear import reference as int8


def smoothed(x: Tensor, shift_K: Tensor | None, smooth_K: Tensor | None) -> Tensor:
    """``(x - shift) / smooth``, a number a column each, both steps rounded to float32; either may be left out."""
    if shift_K is not None:
        x = x.to(torch.float32) - shift_K
    return x if smooth_K is None else x.to(torch.float32) / smooth_K


def quantize(
    x: Tensor,
    form: str = "int8",
    scale: Tensor | None = None,
    shift_K: Tensor | None = None,
    smooth_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each row, of x or of what `smoothed` makes of it.

    Args:
        x: (..., K), floating point.
        form: of the codes: `int8`, `int4` (codes within +-7, a byte each) or `fp8` (e4m3).
        scale: one positive float32 for all rows (static: what lies beyond saturates); None: each row's own, from its
            largest magnitude (per token).
        shift_K: (K,) float32, subtracted from x; or None.
        smooth_K: (K,) positive float32, by which x is then divided; or None.

    Returns:
        codes (..., K), and scales (..., 1) float32. A row that holds a NaN has the scale NaN, so that it shows in
        every product; so has one that holds an infinity, except where integers have a given scale: there it saturates.
    """
    chosen, x = format_of(form), smoothed(x, shift_K, smooth_K)
    if not chosen.is_integer:
        x_MK = x.reshape(-1, x.shape[-1])
        given = None if scale is None else scale.reshape(1, 1)
        codes, scales = fp8.quantize(x_MK, by_row=True, given=given)
        return codes.view(x.shape), scales.view(*x.shape[:-1], 1)
    if scale is None:
        return int8.quantize_rows(x, chosen.largest)
    codes, scales = int8.quantize_given(x, scale.reshape(()), chosen.largest)
    return codes, torch.broadcast_to(scales, (*x.shape[:-1], 1))


def beyond(x: Tensor, form: str, scale: Tensor) -> Tensor:
    """Where x lies beyond the codes of a given scale, as booleans: there a straight-through gradient is zero.

    Rounded first: what is rounded to the last code is not beyond it. Integers only; a NaN is not beyond.
    """
    return (x.to(torch.float32) / scale.reshape(())).round().abs() > format_of(form).largest


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scales``, (..., K), multiplied in float32, then rounded to `dtype`; scales (..., 1), or one in all."""
    return (codes.to(torch.float32) * scales).to(dtype)
