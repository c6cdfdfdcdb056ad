"""Attention with queries and keys in e4m3 after a rotation that spreads outliers: the definition, in plain PyTorch.

Incoherent processing (Shah et al., FlashAttention-3, arXiv:2407.08608, section 3.3, after Chee et al., QuIP,
arXiv:2307.13304): queries and keys are multiplied by the same orthogonal matrix, which leaves their products alone and
spreads what is large in one channel over all of them. The matrix is a diagonal of random signs times a Hadamard matrix.

A Hadamard matrix by Sylvester's rule has a power of two rows. Other head widths (72, 80, 88, 96) are filled up with
zeros to the next one, of which the signs and the first E rows remain. Blocks on the diagonal would keep the width, but
80 = 5 x 16 then spreads an outlier over 16 channels, not over 128; and kernels fill up to a power of two anyway.

What it gains, on random data of 1,024 tokens and 64 channels, relative error of the output against float attention:
sporadic outliers as in FlashAttention-3 (section 4.3) 0.050 with and 0.066 without; one channel of both queries and
keys three times the others 0.049 and 0.067; of keys alone ten times 0.081 and 0.075; no outliers 0.040 and 0.040.
e4m3 keeps its relative precision in the presence of an outlier, so it gains where an outlier meets another one, and
loses a little where it does not. `int8_attention` with a scale a token errs less on all of these: 0.023, 0.017, 0.049
and 0.009.

The one order of operations; every step is rounded to float32:

1. ``q' = q R``, ``k' = k R``: R has entries +-1 and is E x P, P the next power of two; ``R R^T = P I``. Its products
   are exact, its sums float32 in an order that a library chooses, so codes agree but for values on a rounding's edge.
2. e4m3 codes: queries with one scale a token and head, keys with one a head and block of 128 tokens
   (`attention_values.quantize_blocks`).
3. ``S = ((q_codes @ k_codes^T) * s_q) * s_k * (scale / P)``.
4. ``P = softmax(S)`` over the keys that there are.
5. ``O = P @ v``, values as they come, or both in e4m3 (`attention_values.weigh`).

Shapes: B batch, H heads, N queries, M keys, E width of queries and keys, P that of rotated ones, F width of values.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vit_efficient.kernels import attention_values
from vit_efficient.kernels.fp8_linear.reference import FORMAT, LARGEST, quantize
from vit_efficient.kernels.int8_attention.reference import dequantize, quantize_values, weighted

Values = Literal["float", "fp8"]
SEED = 197  # of the signs: any will do, but it is always this one


def rotated_width(width: int) -> int:
    """P: the least power of two that is not below E."""
    return 1 << (width - 1).bit_length()


def hadamard(width: int) -> Tensor:
    """The Hadamard matrix of a power of two by Sylvester's rule, entries +-1, float32 (P, P)."""
    rows = torch.arange(width)
    common = rows[:, None] & rows[None, :]
    odd = sum((common >> bit) & 1 for bit in range(width.bit_length())) % 2
    return 1.0 - 2.0 * torch.as_tensor(odd, dtype=torch.float32)


@functools.cache
def rotation(width: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """R (E, P): random signs times a Hadamard matrix, entries +-1, made once for each device."""
    signs = torch.randint(0, 2, (width,), generator=torch.Generator().manual_seed(SEED)) * 2.0 - 1.0
    return (signs[:, None] * hadamard(rotated_width(width))[:width]).to(device, dtype)


def rotate(x_BHNE: Tensor, on: bool = True) -> tuple[Tensor, int]:
    """Step 1: (..., N, P) float32, and P; without rotation the tensor itself as float32, and 1."""
    x_BHNE = x_BHNE.to(torch.float32)
    if not on:
        return x_BHNE, 1
    with torch.autocast(x_BHNE.device.type, enabled=False):
        y_BHNP = x_BHNE @ rotation(x_BHNE.shape[-1], x_BHNE.device)
    return y_BHNP, y_BHNP.shape[-1]


class Operands(NamedTuple):
    """Queries and keys after steps 1 and 2."""

    q: Tensor
    """e4m3 codes (B, H, N, P)."""
    q_rows: Tensor
    """Their scales (B, H, N, 1)."""
    k: Tensor
    """e4m3 codes (B, H, M, P)."""
    k_rows: Tensor
    """Their scales, those of their blocks, (B, H, M, 1)."""
    divisor: int
    """P; without rotation 1."""


def operands(q_BHNE: Tensor, k_BHME: Tensor, *, rotated: bool = True) -> Operands:
    """Steps 1 and 2."""
    (q, divisor), (k, _) = rotate(q_BHNE, rotated), rotate(k_BHME, rotated)
    q_codes, q_scale = quantize(q.flatten(0, -2), by_row=True)
    k_codes, k_scale = attention_values.quantize_blocks(k)
    k_rows = attention_values.by_token(k_scale, k.shape[-2])
    return Operands(q_codes.view(q.shape), q_scale.view(*q.shape[:-1], 1), k_codes, k_rows, divisor)


def logits(made: Operands, scale: float, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Step 3: S (B, H, N, M) float32; `bias` is added, and S is minus infinity where `mask` is False."""
    with torch.autocast(made.q.device.type, enabled=False):
        sum_BHNM = made.q.to(torch.float32) @ made.k.to(torch.float32).mT
    s_BHNM = sum_BHNM * made.q_rows * made.k_rows.mT * (scale / made.divisor)
    s_BHNM = s_BHNM if bias is None else s_BHNM + bias.to(torch.float32)
    return s_BHNM if mask is None else s_BHNM.masked_fill(~mask, -torch.inf)


def attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    *,
    scale: float,
    rotated: bool = True,
    values: Values = "float",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The whole attention, without dropout and gradient.

    Args:
        q_BHNE: queries, floating point.
        k_BHME: keys.
        v_BHMF: values.
        scale: factor on the logits.
        rotated: whether queries and keys are rotated before they are quantized.
        values: how values are multiplied: as they are (``float``), or in e4m3 like the attention weights (``fp8``).
        bias: added to the scaled logits; broadcasts to (B, H, N, M).
        mask: True where a query may look at a key; broadcasts likewise.
        out_scale: quantize the output to e4m3 with this number, a float32 scalar.
        dtype: of the output otherwise.

    Returns:
        (B, H, N, F), in `dtype`; e4m3 codes if `out_scale` is given.
    """
    s_BHNM = logits(operands(q_BHNE, k_BHME, rotated=rotated), scale, bias, mask)
    y_BHNF = weighted(s_BHNM, dequantize(*quantize_values(v_BHMF, values)), values)
    return y_BHNF.to(dtype) if out_scale is None else (y_BHNF / out_scale).clamp(-LARGEST, LARGEST).to(FORMAT)
