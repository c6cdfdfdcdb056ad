"""A linear layer on codes, and what follows it, in plain PyTorch: the definition of the fused forms.

The layer itself is that of `int8_linear.reference` (int8 codes: exact integer sums) or `fp8_linear.reference` (e4m3
codes: float32 sums): ``y = ((sum * scale_x) * scale_w) + bias`` in float32. What follows works on that y, in float32
and never rounded to 16 bits before it:

- ``gelu``: ``0.5 * y * (1 + erf(y / sqrt(2)))``, the erf form;
- quantization with a given scale (one number): codes for the next layer, of y or of ``(y - shift) / smooth``, a number
  a column each (`quantize.reference`). A row that came in with the scale NaN goes on with the scale NaN, so that a
  diverged model shows;
- the residual: ``residual + gamma * y``, `gamma` the layer scale or left out, rounded to the residual's dtype;
- for q, k and v: the columns (parts, H, E) and rows (B, T) laid out as attention reads them, (parts, B, H, T, E), and
  on request quantized: a scale a token and head, or one given for each part.

Shapes: M rows (all leading dimensions flattened; tokens), K inputs, N outputs, B batch, T tokens an image, H heads, E
head width, P parts (3 of a fused qkv).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.fp8_linear import reference as fp8
from vit_efficient.kernels.int8_linear import reference as int8
from vit_efficient.kernels.int8_linear.product import int8_matmul
from vit_efficient.kernels.quantize import reference as quantization


def product(q_MK: Tensor, scale_M1: Tensor, q_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    """The layer: (M, N) float32.

    Args:
        q_MK: codes of tokens, int8 or float8_e4m3fn.
        scale_M1: their scales, (M, 1) or (1, 1) float32.
        q_NK: codes of the weight, of the same dtype.
        scale_N1: (N, 1) or (1, 1) float32.
        bias_N: floating point, or None.
    """
    if q_MK.dtype == torch.int8:
        return int8.epilogue(int8_matmul(q_MK, q_NK), scale_M1, scale_N1.T, bias_N)
    return fp8.epilogue(fp8.product(q_MK, q_NK), scale_M1, scale_N1, bias_N)


def gelu(y: Tensor) -> Tensor:
    """The erf form, in float32."""
    return F.gelu(y.to(torch.float32))


def requantized(
    y_MN: Tensor,
    scale_M1: Tensor,
    out_scale: Tensor,
    form: str,
    shift_N: Tensor | None = None,
    smooth_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (M, N) under one given scale, and the scale of each row (M, 1): NaN where the incoming one is NaN.

    Weight scales and biases are finite (files with others are refused), so a NaN can come from a row only.
    """
    codes, _ = quantization.quantize(y_MN, form, out_scale, shift_N, smooth_N)
    rows_M1 = scale_M1.expand(y_MN.shape[0], 1)
    return codes, torch.where(rows_M1.isnan(), torch.nan, out_scale.reshape(1, 1))


def with_residual(y_MN: Tensor, residual_MN: Tensor, gamma_N: Tensor | None) -> Tensor:
    """``residual + gamma * y`` in float32, rounded to the residual's dtype."""
    if gamma_N is not None:
        y_MN = gamma_N.to(torch.float32) * y_MN
    return (residual_MN.to(torch.float32) + y_MN).to(residual_MN.dtype)


def heads_first(y_MN: Tensor, tokens: int, heads: int, parts: int) -> Tensor:
    """(P, B, H, T, E), contiguous, of (B T, P H E)."""
    split = y_MN.unflatten(1, (parts, heads, -1)).unflatten(0, (-1, tokens))
    return split.permute(2, 0, 3, 1, 4).contiguous()


def quantized_heads(y_PBHTE: Tensor, form: str, scale_P: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (P, B, H, T, E) and scales (P, B, H, T, 1): a token's and head's own, or one given for each part."""
    format_of(form)
    if scale_P is None:
        return quantization.quantize(y_PBHTE, form)
    made = [quantization.quantize(y, form, scale) for y, scale in zip(y_PBHTE, scale_P.unbind(0), strict=True)]
    codes, scales = zip(*made, strict=True)
    return torch.stack(codes), torch.stack(scales)
