"""Gradients of a linear layer's output together with their sums, in plain PyTorch: this file is the definition.

The bias' gradient is the sum over rows of the gradient of the layer's output. Here both come of one pass: the sums are
of float32 numbers, before these are rounded to 16 bits.

Shapes: M rows (images x tokens), N columns, B batch, H heads, T tokens, E head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# `model.gelu.P`, which rooms below cannot import; a test holds them together.
P = (0.18666867889786506, 0.09853260497599234, 0.33696019724467313, -0.12218806255643279)


def slope(y: Tensor) -> Tensor:
    """The derivative of GELU's erf form within 4e-5, as `model.gelu` has it; y float32."""
    u = (y.abs() * 0.44 + 1).reciprocal()
    density = torch.exp(y * y * -0.5)
    beyond = ((u * P[3] + P[2]) * u + P[1]).mul(u).add(P[0]) * u * density
    return torch.where(y < 0, beyond, 1 - beyond) + y * density * (1 / math.sqrt(2 * math.pi))


def gelu_gradient(grad_MN: Tensor, x_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Of what enters GELU: the gradient (M, N), in the dtype of `grad_MN`, and its sums over rows (N,), float32."""
    made_MN = grad_MN.to(torch.float32) * slope(x_MN.to(torch.float32))
    return made_MN.to(grad_MN.dtype), made_MN.sum(0)


def heads_gradient(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries, keys and values as that of their fused projection: (B * T, 3 * H * E), and its sums over
    rows (3 * H * E,), float32."""
    batch, heads, tokens, width = q_BHTE.shape
    made = torch.stack((q_BHTE, k_BHTE, v_BHTE)).permute(1, 3, 0, 2, 4)
    made = made.reshape(batch * tokens, 3 * heads * width)
    return made, made.sum(0, dtype=torch.float32)
