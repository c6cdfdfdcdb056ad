"""Mixed-precision attention in plain PyTorch: this file is the definition, every faster form must equal it.

After the QAttn paper (Kluska et al., CVPR workshops 2024), equations 15 to 18: queries, keys and values are quantized
to int8; the product of queries and keys is exact in integers; softmax and the product with the values are floating
point. One departure, as in `int8_linear`: scales are ``amax / 127`` and codes stay within +-127.

The one order of operations; every step is rounded to float32:

1. ``q, k, v`` to float32, then to codes and scales: one scale a token and head (`quantize_rows`), one a tensor
   (`quantize_tensor`), or a calibrated one (`quantize_given`, which saturates). Keys may have one a head and block of
   128 tokens instead (`Keys`).
2. ``sum = q_codes @ k_codes^T``: exact, int32.
3. ``S = ((float32(sum) * s_q) * s_k) * scale`` (equation 15; `scale` is 1 / sqrt(E)), then ``S + bias``, then minus
   infinity where `mask` is False.
4. ``P = softmax(S)`` over the keys that there are, and no others (equation 16). A query that may look at no key gets
   zeros, as PyTorch's attention gives it.
5. ``O = P @ (v_codes * s_v)`` (equation 18), then the output's dtype. Equation 17 also quantizes the output of the
   static form: `attend` does on request, from the float32 output, with the scale of the projection behind it.

Step 5 has two other forms, by `Values`: values as they come, not quantized (`float`: where they arrive in 16 bits
anyway, as from a projection that ran in floating point, this is exact and saves a pass); and both its operands in e4m3
(`fp8`, `attention_values`).

Softmax and the last product are sums in an order that a library chooses, so outputs are compared within float32
rounding; codes, scales and S are compared bit for bit.

Shapes: B batch, H heads, N queries, M keys, E width of queries and keys, F width of values. Leading dimensions may be
any.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vit_efficient.kernels import attention_values
from vit_efficient.kernels.int8_linear.reference import (
    EXACT_WIDTH,
    LARGEST_CODE,
    SMALLEST_SCALE,
    WIDEST,
    dequantize_rows,
    quantize_given,
    quantize_rows,
)

Granularity = Literal["token", "tensor"]
Scales = tuple[Tensor, Tensor, Tensor | None]
Values = Literal["int8", "float", "fp8"]
Keys = Literal["token", "block"]


def quantize(x: Tensor, granularity: Granularity = "token", scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Step 1: codes (..., K) int8 and scales (..., 1) float32 of x (..., K); `scale` is a calibrated one."""
    if scale is not None:
        return quantize_given(x, scale)
    return quantize_rows(x) if granularity == "token" else quantize_tensor(x)


def quantize_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes with one scale for all of `x`, chosen from its largest magnitude.

    Every image of a batch shares the scale, so what a model says of an image depends on its neighbours.

    Args:
        x: (..., K), floating point.

    Returns:
        codes (..., K) int8, and the scale (..., 1) float32, the same in every row (NaN if `x` is not finite).
    """
    codes, scale = quantize_rows(x.reshape(1, -1))
    return codes.view(x.shape), scale.expand(*x.shape[:-1], 1)


def quantize_keys(
    k_BHME: Tensor, keys: Keys = "token", granularity: Granularity = "token", scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`quantize`, or with one scale a head and block of 128 tokens (`attention_values.quantize_blocks`)."""
    if keys == "token" or scale is not None:
        return quantize(k_BHME, granularity, scale)
    codes, blocks = attention_values.quantize_blocks(k_BHME, integer=True)
    return codes, attention_values.by_token(blocks, codes.shape[-2])


def quantize_values(
    v_BHMF: Tensor, values: Values = "int8", granularity: Granularity = "token", scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Codes (..., M, F) and scales (..., M, 1) of values as step 5 wants them; ``float``: themselves, and None."""
    if values == "int8":
        return quantize(v_BHMF, granularity, scale)
    if values == "float":
        return v_BHMF, None
    codes, blocks = attention_values.quantize_blocks(v_BHMF)
    return codes, attention_values.by_token(blocks, codes.shape[-2])


def dequantize(codes: Tensor, scale: Tensor | None) -> Tensor:
    """What `quantize_values` gave, as float32."""
    return codes.to(torch.float32) if scale is None else dequantize_rows(codes, scale)


def quantize_tensor_scale(x: Tensor) -> Tensor:
    """The scale alone of `quantize_tensor`, a scalar."""
    low, high = torch.aminmax(x)
    amax = torch.maximum(high, -low).to(torch.float32)
    scale = (amax / torch.full_like(amax, LARGEST_CODE)).clamp_min(SMALLEST_SCALE)
    return torch.where(amax.isfinite(), scale, torch.nan)


def int8_matmul(q_BHNE: Tensor, k_BHME: Tensor) -> Tensor:
    """``q @ k^T`` of int8 codes for every head, exactly, as int32 (B, H, N, M).

    E is split so that no partial sum leaves the integers that float32 represents.

    Raises:
        ValueError: E is so wide that int32 could overflow.
    """
    width = q_BHNE.shape[-1]
    if width > WIDEST:
        raise ValueError(f"int8_attention: heads {width:,} wide can overflow int32; {WIDEST:,} is the most.")
    parts = zip(q_BHNE.split(EXACT_WIDTH, dim=-1), k_BHME.split(EXACT_WIDTH, dim=-1), strict=True)
    with torch.autocast(q_BHNE.device.type, enabled=False):  # it would round the sums to its own dtype
        first, *rest = ((q.to(torch.float32) @ k.to(torch.float32).mT).to(torch.int32) for q, k in parts)
    return sum(rest, start=first)


def logits(
    sum_BHNM: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    scale: float,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Step 3: integer sums to float32 logits.

    Args:
        sum_BHNM: int32, from `int8_matmul`.
        q_scale: (B, H, N, 1) float32.
        k_scale: (B, H, M, 1) float32.
        scale: factor on the logits.
        bias: added; broadcasts to (B, H, N, M).
        mask: True where a query may look at a key; broadcasts likewise.
    """
    s_BHNM = ((sum_BHNM.to(torch.float32) * q_scale) * k_scale.mT) * scale
    if bias is not None:
        s_BHNM = s_BHNM + bias.to(torch.float32)
    return s_BHNM if mask is None else s_BHNM.masked_fill(~mask, -torch.inf)


def softmax(s_BHNM: Tensor) -> Tensor:
    """Step 4: over the last dimension; zeros where every logit is minus infinity."""
    return torch.softmax(s_BHNM, dim=-1).masked_fill(s_BHNM.amax(dim=-1, keepdim=True) == -torch.inf, 0.0)


def int8_attention(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float,
    granularity: Granularity = "token",
    scales: Scales | None = None,
    values: Values = "int8",
    keys: Keys = "token",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The whole attention, without gradient and dropout.

    Args:
        q_BHNE: queries, floating point.
        k_BHME: keys.
        v_BHMF: values.
        bias: added to the scaled logits; broadcasts to (B, H, N, M).
        mask: True where a query may look at a key; broadcasts likewise.
        scale: factor on the logits.
        granularity: of scales that are chosen here.
        scales: calibrated ones of queries, keys and values, each one positive float32; of values where those are int8.
        values: how values are multiplied.
        keys: what shares a scale among keys whose scales are chosen here.
        dtype: of the output.

    Returns:
        (B, H, N, F).
    """
    given = (None, None, None) if scales is None else scales
    q, q_scale = quantize(q_BHNE, granularity, given[0])
    k, k_scale = quantize_keys(k_BHME, keys, granularity, given[1])
    v_BHMF = dequantize(*quantize_values(v_BHMF, values, granularity, given[2]))
    return weighted(logits(int8_matmul(q, k), q_scale, k_scale, scale, bias, mask), v_BHMF, values).to(dtype)


def weighted(s_BHNM: Tensor, v_BHMF: Tensor, values: Values) -> Tensor:
    """Steps 4 and 5: (B, H, N, F) float32 from values that are dequantized."""
    if values == "fp8":
        return attention_values.weigh_rounded(s_BHNM, v_BHMF)
    with torch.autocast(s_BHNM.device.type, enabled=False):
        return softmax(s_BHNM) @ v_BHMF


def operand(x_BHNE: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (..., E) int8 and scales (..., 1) float32 of one operand of `attend`.

    Args:
        x_BHNE: floating point, to be quantized: with one scale a token and head, or with a given one. Or int8: codes.
        scale: None; or one positive number, or of codes one a token and head, (..., 1); float32.
    """
    if x_BHNE.dtype != torch.int8:
        return quantize(x_BHNE, "token", scale)
    assert scale is not None, "codes have a scale"
    return x_BHNE, scale.expand(*x_BHNE.shape[:-1], 1)


def attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float,
    values: Values = "int8",
    keys: Keys = "token",
    out_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The whole attention from operands in any form, as kernels are given them; no bias, mask, dropout, gradient.

    Args:
        q_BHNE: queries: floating point, or int8 codes.
        k_BHME: keys, likewise.
        v_BHMF: values, likewise; floating point where `values` is not ``int8``.
        q_scale: with floating-point queries None (one scale a token and head is chosen) or a calibrated number; with
            codes their scales, one number or (B, H, N, 1). float32.
        k_scale: of the keys.
        v_scale: of the values; None where they are not int8.
        scale: factor on the logits.
        values: how values are multiplied: quantized to int8 and back (``int8``), as they are (``float``), or in e4m3
            like the attention weights (``fp8``).
        keys: of floating-point keys whose scales are chosen here: one a token and head, or one a head and block of 128
            tokens (`attention_values.quantize_blocks`), which kernels multiply with once a block.
        out_scale: quantize the output to int8 with this number, a float32 scalar (equation 17). A NaN has the code 0.
        dtype: of the output otherwise.

    Returns:
        (B, H, N, F), in `dtype`; int8 codes if `out_scale` is given.
    """
    q, q_rows = operand(q_BHNE, q_scale)
    k, k_rows = operand(k_BHME, k_scale) if k_BHME.dtype == torch.int8 else quantize_keys(k_BHME, keys, scale=k_scale)
    s_BHNM = logits(int8_matmul(q, k), q_rows, k_rows, scale)
    v = operand(v_BHMF, v_scale) if values == "int8" else quantize_values(v_BHMF, values)
    y_BHNF = weighted(s_BHNM, dequantize(*v), values)
    return y_BHNF.to(dtype) if out_scale is None else quantize_given(y_BHNF, out_scale)[0]
