"""Attention weights times values where both are e4m3: the definition, in plain PyTorch.

Beside the float product of `int8_attention.reference` this is the faster one of GPUs with fp8 matrix units. Values have
one scale a block of `BLOCK` keys. Weights need no scale: before they are divided by their sum they lie in 0 .. 1, and
`WEIGHT` times them uses the format's range without reaching its end (Shah et al., FlashAttention-3, arXiv:2407.08608,
section 3.3, has both operands in e4m3 with a scale a block).

Shapes: B batch, H heads, N queries, M keys, F width of values, C blocks of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.fp8_linear.reference import FORMAT, LARGEST
from vit_efficient.kernels.int8_linear import reference as int8

BLOCK = 128  # keys that share a scale
WEIGHT = 256.0  # what weights in 0 .. 1 are multiplied by before they are rounded to e4m3
# Scales of blocks are at least this: kernels divide one block's scale by the next one's, which must not overflow.
SMALLEST_SCALE = 2.0**-40


def quantize_blocks(x_BHME: Tensor, *, integer: bool = False) -> tuple[Tensor, Tensor]:
    """Codes with one scale a head and block of `BLOCK` tokens.

    ``scale = amax(|block|) / 448``, at least `SMALLEST_SCALE`, in float32; ``codes = e4m3(clamp(x / scale))``, ties to
    even. Of integers the divisor is 127 and the smallest scale that of `int8_linear`. A block that holds a NaN or an
    infinity has the scale NaN.

    Args:
        x_BHME: (..., M, E), floating point.
        integer: int8 codes; else e4m3.

    Returns:
        codes (..., M, E), and scales (..., C) float32, C = ceil(M / BLOCK).
    """
    tokens = x_BHME.shape[-2]
    blocks = F.pad(x_BHME.to(torch.float32), (0, 0, 0, -tokens % BLOCK)).unflatten(-2, (-1, BLOCK))
    if integer:
        flat, scale = int8.quantize_rows(blocks.flatten(-2))
        return flat.view(blocks.shape).flatten(-3, -2)[..., :tokens, :], scale.squeeze(-1)
    amax = blocks.abs().amax(dim=(-2, -1))
    # By a tensor: PyTorch divides by a number on CUDA as a product with its reciprocal, which can be one bit off.
    scale = (amax / torch.full_like(amax, LARGEST)).clamp_min(SMALLEST_SCALE)
    codes = (blocks / scale[..., None, None]).clamp(-LARGEST, LARGEST).flatten(-3, -2)[..., :tokens, :]
    return codes.to(FORMAT), torch.where(amax.isfinite(), scale, torch.nan)


def dequantize_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes (..., M, E) with scales (..., C) of their blocks stand for, float32."""
    return codes.to(torch.float32) * by_token(scale, codes.shape[-2])


def by_token(scale: Tensor, tokens: int) -> Tensor:
    """Scales of blocks (..., C) as one a token, (..., M, 1)."""
    return scale.repeat_interleave(BLOCK, dim=-1)[..., :tokens, None]


def weigh(s_BHNM: Tensor, v_BHMF: Tensor) -> Tensor:
    """``softmax(S) @ v`` with e4m3 weights and values and float32 sums: (B, H, N, F) float32.

    ``u = exp(S - max S)``; ``O = (e4m3(WEIGHT u) @ v_codes) * v_scale / (WEIGHT sum(u))``, where the sum is over `u` as
    it was before it was rounded. A kernel takes the largest logit so far for the largest, so its weights are rounded
    elsewhere: outputs agree within the rounding of e4m3, not closer.

    Args:
        s_BHNM: logits; minus infinity where a query may not look. A query that may look at no key gets zeros.
        v_BHMF: values, floating point.
    """
    return weigh_rounded(s_BHNM, dequantize_blocks(*quantize_blocks(v_BHMF)))


def weigh_rounded(s_BHNM: Tensor, v_BHMF: Tensor, dropped: Tensor | None = None) -> Tensor:
    """`weigh` with values that are what e4m3 codes stand for, float32.

    Args:
        s_BHNM: logits.
        v_BHMF: such values.
        dropped: what the weights are multiplied by after they are rounded: zeros where they are dropped. Broadcasts.
    """
    largest = s_BHNM.amax(dim=-1, keepdim=True)
    nothing = largest == -torch.inf
    u_BHNM = (s_BHNM - largest.masked_fill(nothing, 0)).exp()
    rounded = (u_BHNM * WEIGHT).to(FORMAT).to(torch.float32)
    rounded = rounded if dropped is None else rounded * dropped
    with torch.autocast(s_BHNM.device.type, enabled=False):
        y_BHNF = rounded @ v_BHMF
    return (y_BHNF / (WEIGHT * u_BHNM.sum(dim=-1, keepdim=True))).masked_fill(nothing, 0)
