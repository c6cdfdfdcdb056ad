"""The integer linear layer in plain PyTorch: this file is the definition, every faster form must equal it.

Symmetric integers after the QAttn paper (Kluska et al., CVPR workshops 2024), equations 1, 4, 5 and 9-11. A weight has
one scale per output row, per group of inputs within a row, or one in all; an activation has one per token or one in
all, chosen anew in each forward (dynamic), or a calibrated one (static). One departure: equation 2 divides the largest
magnitude by 127.5, which would round the maximum itself to 128; here the divisor is 127 and codes stay within +-127, so
that the code book is symmetric. With 4 bits it is 7 and +-7.

Shapes: M tokens (all leading dimensions flattened), K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear.scheme import Scheme

LARGEST_CODE = 127
# Smallest normal float32. A scale never goes below it: zero rows divide by it instead of by zero, and rows of subnormal
# size do not depend on whether the processor flushes subnormals (they lose at most 2**-127 a value).
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# Integers up to 2**24 are exact in float32, whatever the order they are added in.
EXACT_WIDTH = 2**24 // LARGEST_CODE**2  # 1040
# int32 holds the sum of this many products.
WIDEST = (2**31 - 1) // LARGEST_CODE**2  # 133,144


def quantize_rows(x: Tensor, largest: int = LARGEST_CODE) -> tuple[Tensor, Tensor]:
    """Quantize each row (last dimension) to integers with its own scale.

    ``scale = amax(|x|) / largest``, at least `SMALLEST_SCALE`; ``codes = clamp(round(x / scale), -largest, largest)``,
    ties to even; all in float32. A row of zeros has zero codes. A row that holds a NaN or an infinity has the scale
    NaN: its codes mean nothing, and every product with them is NaN, so a diverged model shows in its loss.

    Args:
        x: (..., K), floating point.
        largest: the largest code: 127 of 8 bits, 7 of 4.

    Returns:
        codes (..., K) int8, and scales (..., 1) float32.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(dim=-1, keepdim=True)
    # By a tensor: PyTorch divides by a number on CUDA as a product with its reciprocal, which can be one bit off.
    scale = (amax / torch.full_like(amax, largest)).clamp_min(SMALLEST_SCALE)
    codes = (x / scale).round().clamp(-largest, largest).nan_to_num(0)
    return codes.to(torch.int8), torch.where(amax.isfinite(), scale, torch.nan)


def quantize_given(x: Tensor, scale: Tensor, largest: int = LARGEST_CODE) -> tuple[Tensor, Tensor]:
    """Quantize with scales that are given (static quantization, equation 1); what lies beyond saturates.

    Args:
        x: (..., K), floating point.
        scale: positive float32; broadcasts to (..., 1) for activations, to x for weights.
        largest: the largest code.

    Returns:
        codes (..., K) int8, and the scale of each row, (..., 1) float32 (that of x's shape if `scale` had it): NaN for
        a row that holds a NaN. Infinities saturate.
    """
    x = x.to(torch.float32)
    codes = (x / scale).round().clamp(-largest, largest).nan_to_num(0)
    bad = x.isnan().any(dim=-1, keepdim=True)
    return codes.to(torch.int8), torch.where(bad, torch.nan, scale)


def quantize_activations(x_MK: Tensor, scheme: Scheme, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (M, K) and scales (M, 1) of activations under a scheme; `scale` (a scalar) where it is static."""
    if scheme.activations == "none":
        raise ValueError("this scheme does not quantize activations, so they have no codes")
    largest = scheme.largest_activation
    if scheme.activations == "static":
        assert scale is not None, "static activations have a scale"
        codes, rows = quantize_given(x_MK, scale.reshape(1, 1), largest)
        return codes, rows.expand(x_MK.shape[0], 1)
    if scheme.activations == "tensor" and x_MK.numel():  # of nothing there is no largest magnitude
        codes, one = quantize_rows(x_MK.reshape(1, -1), largest)
        return codes.view(x_MK.shape), one.expand(x_MK.shape[0], 1)
    return quantize_rows(x_MK, largest)


def quantize_weight(
    weight_NK: Tensor, scheme: Scheme, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales (N, G) of a weight under a scheme, (1, 1) if it has one scale in all.

    Args:
        weight_NK: floating point.
        scheme: how.
        scale: given scales of that shape; None: the largest magnitude decides, or with zero points the range.
        zero: given zero points (N, G), whole numbers, if the scheme has them and scales are given.
    """
    rows, inputs = weight_NK.shape
    largest = scheme.largest_weight
    if scheme.zero_point:
        if scale is None or zero is None:
            scale, zero = weight_range(weight_NK, scheme)
        steps = grouped(weight_NK.to(torch.float32), scheme.group) / scale.unsqueeze(-1)
        low, high = -zero.unsqueeze(-1), 15 - zero.unsqueeze(-1)
        codes = steps.round().clamp(low, high).nan_to_num(0).to(torch.int8)
        made = torch.where(steps.isnan().any(dim=-1), torch.nan, scale)
        return codes.view(rows, -1)[:, :inputs].contiguous(), made
    if scheme.weights == "tensor":
        flat = weight_NK.reshape(1, -1)
        codes, made = quantize_rows(flat, largest) if scale is None else quantize_given(flat, scale, largest)
        return codes.view(rows, inputs), made
    parts = grouped(weight_NK, scheme.group)
    if scale is None and scheme.group is None:
        codes, made = quantize_rows(parts, largest)
    else:
        scale = _group_scale(parts, largest) if scale is None else scale
        codes, made = quantize_given(parts, scale.unsqueeze(-1), largest)
    return codes.view(rows, -1)[:, :inputs].contiguous(), made.squeeze(-1)


def grouped(x_NK: Tensor, group: int | None) -> Tensor:
    """(N, G, group): groups of inputs, the last one filled up with zeros; one group of all where `group` is None."""
    size = x_NK.shape[1] if group is None else group
    return F.pad(x_NK, (0, -x_NK.shape[1] % size)).unflatten(1, (-1, size))


def _group_scale(parts_NGg: Tensor, largest: int) -> Tensor:
    amax = parts_NGg.to(torch.float32).abs().amax(dim=-1)
    scale = in_16_bits(amax / torch.full_like(amax, largest)).clamp_min(SMALLEST_SCALE)
    return torch.where(amax.isfinite(), scale, torch.nan)


def in_16_bits(scale_NG: Tensor) -> Tensor:
    """Scales of groups, rounded to bfloat16 (and float32 still): with 128 weights a group, 32 bits would be a quarter
    of a bit a weight. Codes are chosen for the rounded scale."""
    return scale_NG.to(torch.bfloat16).to(torch.float32)


def weight_range(weight_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scales and zero points, each (N, G) float32, that cover each group's range with 16 codes; 0 is one of them."""
    parts = grouped(weight_NK.to(torch.float32), scheme.group)
    low, high = parts.amin(dim=-1).clamp_max(0), parts.amax(dim=-1).clamp_min(0)
    scale = (high - low) / torch.full_like(low, 15)
    scale = (scale if scheme.group is None else in_16_bits(scale)).clamp_min(SMALLEST_SCALE)
    scale = torch.where((high - low).isfinite(), scale, torch.nan)
    return scale, (-low / scale).round().clamp(0, 15).nan_to_num(0)


def dequantize_weight(q_NK: Tensor, scale_NG: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that the codes stand for, multiplied in float32, then cast."""
    if scheme.group is None:
        return (q_NK.to(torch.float32) * scale_NG).to(dtype)
    scale_NK = scale_NG.repeat_interleave(scheme.group, dim=1)[:, : q_NK.shape[1]]
    return (q_NK.to(torch.float32) * scale_NK).to(dtype)


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
    with torch.autocast(q_MK.device.type, enabled=False):  # which would round the codes' sums
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


def grouped_matmul(q_MK: Tensor, q_NK: Tensor, scale_NG: Tensor, group: int) -> Tensor:
    """The product where each group of inputs has weight scales of its own, float32 (M, N).

    ``y = sum_g float32(sum_g) * scale_g``: an exact integer sum in each group, its product with the scale rounded to
    float32, and the groups added in float32 from the first to the last. `epilogue` follows with scale_N = 1.
    """
    y_MN = torch.zeros(q_MK.shape[0], q_NK.shape[0], device=q_MK.device)
    parts = zip(q_MK.split(group, dim=1), q_NK.split(group, dim=1), scale_NG.unbind(1), strict=True)
    for a_MK, b_NK, scale_N in parts:
        y_MN = y_MN + int8_matmul(a_MK, b_NK).to(torch.float32) * scale_N
    return y_MN


def int8_linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype = torch.float32,
    scheme: Scheme = Scheme(),  # noqa: B008 - immutable
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
) -> Tensor:
    """The whole layer: quantize both operands, multiply integers, scale. x (..., K) gives (..., N). No gradient."""
    q_NK, scale_NG = quantize_weight(weight_NK, scheme, weight_scale, weight_zero)
    q_MK, scale_M1 = quantize_activations(x.reshape(-1, x.shape[-1]), scheme, input_scale)
    if scheme.group is None:
        y_MN = epilogue(int8_matmul(q_MK, q_NK), scale_M1, scale_NG.T, bias_N, dtype)
    else:
        ones_N = torch.ones(q_NK.shape[0], device=x.device)
        y_MN = epilogue(grouped_matmul(q_MK, q_NK, scale_NG, scheme.group), scale_M1, ones_N, bias_N, dtype)
    return y_MN.reshape(*x.shape[:-1], q_NK.shape[0])
