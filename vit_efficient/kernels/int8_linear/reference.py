"""The integer linear layer in plain PyTorch: this file is the definition, every faster form must equal it.

Symmetric W8A8 after the QAttn paper (Kluska et al., CVPR workshops 2024), equations 1, 4, 5 and 9-11: a weight has one
scale per output row, an activation one per token, chosen anew in each forward. One departure: equation 2 divides the
largest magnitude by 127.5, which would round the maximum itself to 128; here the divisor is 127 and codes stay within
+-127, so that the code book is symmetric.

Shapes: M tokens (all leading dimensions flattened), K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CODE = 127
# Smallest normal float32. A scale never goes below it: zero rows divide by it instead of by zero, and rows of subnormal
# size do not depend on whether the processor flushes subnormals (they lose at most 2**-127 a value).
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Integers up to 2**24 are exact in float32, whatever the order they are added in.
EXACT_WIDTH = 2**24 // LARGEST_CODE**2  # 1040
# int32 holds the sum of this many products.
WIDEST = (2**31 - 1) // LARGEST_CODE**2  # 133,144


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row (last dimension) to int8 with its own scale.

    ``scale = amax(|x|) / 127``, at least `SMALLEST_SCALE`; ``codes = clamp(round(x / scale), -127, 127)``, ties to
    even; all in float32. A row of zeros has zero codes. A row that holds a NaN or an infinity has the scale NaN: its
    codes mean nothing, and every product with them is NaN, so a diverged model shows in its loss.

    Args:
        x: (..., K), floating point.

    Returns:
        codes (..., K) int8, and scales (..., 1) float32.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(dim=-1, keepdim=True)
    # By a tensor: PyTorch divides by a number on CUDA as a product with its reciprocal, which can be one bit off.
    scale = (amax / torch.full_like(amax, LARGEST_CODE)).clamp_min(SMALLEST_SCALE)
    codes = (x / scale).round().clamp(-LARGEST_CODE, LARGEST_CODE).nan_to_num(0)
    return codes.to(torch.int8), torch.where(amax.isfinite(), scale, torch.nan)


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes * scale``, multiplied in float32 (equation 3), then cast to `dtype`."""
    return (codes.to(torch.float32) * scale).to(dtype)


def int8_matmul(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    """``q_MK @ q_NK.T`` of int8 codes, exactly, as int32 (M, N).

    Runs on any device that multiplies float32 matrices in full float32: K is split so that no partial sum leaves the
    integers that float32 represents, and the parts are added in int32.

    Raises:
        ValueError: K is so wide that int32 could overflow.
    """
    width = q_MK.shape[1]
    if width > WIDEST:
        raise ValueError(f"int8_matmul: {width:,} inputs can overflow int32; {WIDEST:,} is the most.")
    total_MN = torch.zeros(q_MK.shape[0], q_NK.shape[0], dtype=torch.int32, device=q_MK.device)
    for a_MK, b_NK in zip(q_MK.split(EXACT_WIDTH, dim=1), q_NK.split(EXACT_WIDTH, dim=1), strict=True):
        total_MN += (a_MK.to(torch.float32) @ b_NK.to(torch.float32).T).to(torch.int32)
    return total_MN


def epilogue(
    sum_MN: Tensor, scale_M1: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Integers to outputs (equations 10 and 11), in the one order that every kernel keeps.

    ``y = (float32(sum) * scale_M1) * scale_N + bias``, each step rounded to float32 (no fused multiply-add), then cast
    to `dtype`. Sums beyond 2**24 round to float32, ties to even.
    """
    y_MN = (sum_MN.to(torch.float32) * scale_M1) * scale_N
    if bias_N is not None:
        y_MN = y_MN + bias_N.to(torch.float32)
    return y_MN.to(dtype)


def int8_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The whole layer: quantize both operands, multiply integers, scale. x (..., K) gives (..., N). No gradient."""
    q_NK, scale_N1 = quantize_rows(weight_NK)
    q_MK, scale_M1 = quantize_rows(x.reshape(-1, x.shape[-1]))
    y_MN = epilogue(int8_matmul(q_MK, q_NK), scale_M1, scale_N1.T, bias_N, dtype)
    return y_MN.reshape(*x.shape[:-1], -1)
