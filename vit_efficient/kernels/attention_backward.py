"""The backward pass of attention on codes: as if float attention had been given what the codes stand for.

Shapes: B batch, H heads, N queries, M keys, E width of queries and keys, F width of values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def drop(p_BHNM: Tensor, factor_BHNM: Tensor | None) -> Tensor:
    """Attention weights times what dropout multiplies them by, if there is dropout."""
    return p_BHNM if factor_BHNM is None else p_BHNM * factor_BHNM


def gradients(
    grad_BHNF: Tensor,
    p_BHNM: Tensor,
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    scale: float,
    dropped: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of queries, keys, values and logits, float32; whatever autocast says.

    Args:
        grad_BHNF: of the output.
        p_BHNM: attention weights before dropout, float32.
        q_BHNE: queries, dequantized, float32.
        k_BHME: keys, likewise.
        v_BHMF: values, likewise.
        scale: factor on the logits.
        dropped: what `drop` multiplied by, or None.
    """
    with torch.autocast(grad_BHNF.device.type, enabled=False):
        g_BHNF = grad_BHNF.to(torch.float32)
        grad_v = drop(p_BHNM, dropped).mT @ g_BHNF
        grad_p = drop(g_BHNF @ v_BHMF.mT, dropped)
        grad_s = p_BHNM * (grad_p - (grad_p * p_BHNM).sum(dim=-1, keepdim=True))
        return grad_s @ k_BHME * scale, grad_s.mT @ q_BHNE * scale, grad_v, grad_s
