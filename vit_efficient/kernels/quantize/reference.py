"""Quantization of rows in plain PyTorch: one entry to the definitions of the integer and the fp8 linear layer.

Shapes: M rows (all leading dimensions flattened), K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.fp8_linear import reference as fp8
from vit_efficient.kernels.int8_linear import reference as int8


def quantize(x: Tensor, form: str = "int8", scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each row.

    Args:
        x: (..., K), floating point.
        form: of the codes: `int8`, `int4` (codes within +-7, a byte each) or `fp8` (e4m3).
        scale: one positive float32 for all rows (static: what lies beyond saturates); None: each row's own, from its
            largest magnitude (per token).

    Returns:
        codes (..., K), and scales (..., 1) float32. A row that holds a NaN has the scale NaN, so that it shows in
        every product; so has one that holds an infinity, except where integers have a given scale: there it saturates.
    """
    chosen = format_of(form)
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
