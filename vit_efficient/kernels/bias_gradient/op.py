"""Gradients and their sums over rows, one pass on a GPU, as operators; `reference` is the definition.

Inputs may be strided; what is returned is contiguous, which the compiler is told. No gradients of these gradients.

Shapes: M rows (images x tokens), N columns, B batch, H heads, T tokens, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.bias_gradient import reference
from vit_efficient.kernels.device import runs_triton


@torch.library.custom_op("vit_efficient::gelu_gradient", mutates_args=())
def gelu_gradient(grad_MN: Tensor, x_MN: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of what enters GELU, and its sums.

    Args:
        grad_MN: of what leaves GELU, floating point.
        x_MN: what entered it.

    Returns:
        (M, N) in the dtype of `grad_MN`; its sums over rows (N,) float32.
    """
    if runs_triton(x_MN) and x_MN.numel():
        from vit_efficient.kernels.bias_gradient import triton

        return triton.gelu_gradient(grad_MN, x_MN)
    made_MN, sums_N = reference.gelu_gradient(grad_MN, x_MN)
    return made_MN.contiguous(), sums_N


@gelu_gradient.register_fake
def _(grad_MN: Tensor, x_MN: Tensor) -> tuple[Tensor, Tensor]:
    return grad_MN.new_empty(grad_MN.shape), grad_MN.new_empty((grad_MN.shape[1],), dtype=torch.float32)


@torch.library.custom_op("vit_efficient::heads_gradient", mutates_args=())
def heads_gradient(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a fused projection of queries, keys and values, and its sums.

    Args:
        q_BHTE: the gradient of queries, floating point.
        k_BHTE: of keys, in the same dtype.
        v_BHTE: of values, likewise.

    Returns:
        (B * T, 3 * H * E) in their dtype; its sums over rows (3 * H * E,) float32.
    """
    if runs_triton(q_BHTE) and q_BHTE.numel():
        from vit_efficient.kernels.bias_gradient import triton

        return triton.heads_gradient(q_BHTE, k_BHTE, v_BHTE)
    made, sums = reference.heads_gradient(q_BHTE, k_BHTE, v_BHTE)
    return made.contiguous(), sums


@heads_gradient.register_fake
def _(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q_BHTE.shape
    columns = 3 * heads * width
    return q_BHTE.new_empty((batch * tokens, columns)), q_BHTE.new_empty((columns,), dtype=torch.float32)
