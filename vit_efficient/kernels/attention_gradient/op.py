"""The backward pass of attention over short sequences, one pass on a GPU, as an operator; `reference` defines it.

Inputs may be strided; what is returned is contiguous, which the compiler is told. No gradients of these gradients.

Shapes: B batch, H heads, T tokens, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.attention_gradient import reference
from vit_efficient.kernels.device import runs_triton

LONGEST = 256  # tokens whose keys and values a program holds at once
WIDTHS = (32, 64)  # of 128 the gradients of keys and values would not stay in registers


def fits(q_BHTE: Tensor) -> bool:
    """Whether the kernel is meant for attention with these queries."""
    return q_BHTE.dtype in (torch.bfloat16, torch.float16) and q_BHTE.shape[2] <= LONGEST and q_BHTE.shape[3] in WIDTHS


@torch.library.custom_op("vit_efficient::attention_gradient", mutates_args=())
def attention_gradient(
    grad_BHTE: Tensor, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, out_BHTE: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of the projection that queries, keys and values are fused in, and its sums.

    Args:
        grad_BHTE: of the output, floating point.
        q_BHTE: queries, in the same dtype.
        k_BHTE: keys, likewise.
        v_BHTE: values, likewise.
        out_BHTE: the output, likewise.
        lse_BHT: natural logarithms of sums of exponentials of scaled logits, float32; or (B, H, T, 1).
        scale: factor on the logits.

    Returns:
        (B * T, 3 * H * E) in their dtype; its sums over rows (3 * H * E,) float32.
    """
    if runs_triton(q_BHTE) and q_BHTE.numel():
        from vit_efficient.kernels.attention_gradient import triton

        return triton.attention_gradient(grad_BHTE, q_BHTE, k_BHTE, v_BHTE, out_BHTE, lse_BHT, scale)
    made, sums = reference.attention_gradient(grad_BHTE, q_BHTE, k_BHTE, v_BHTE, out_BHTE, lse_BHT, scale)
    return made.contiguous(), sums


@attention_gradient.register_fake
def _(
    grad_BHTE: Tensor, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, out_BHTE: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q_BHTE.shape
    columns = 3 * heads * width
    return q_BHTE.new_empty((batch * tokens, columns)), q_BHTE.new_empty((columns,), dtype=torch.float32)
