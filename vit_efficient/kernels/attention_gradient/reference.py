"""The backward pass of attention in plain PyTorch and float32: this file is the definition.

Of S = scale * Q K^T, P = softmax(S) and O = P V, it makes P again from what the forward pass kept of it, the logarithm
of each row's sum of exponentials.

Shapes: B batch, H heads, T tokens, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_gradient(
    grad_BHTE: Tensor, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, out_BHTE: Tensor, lse_BHT: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of the projection that queries, keys and values are fused in, and its sums over rows.

    Args:
        grad_BHTE: of the output.
        q_BHTE: queries.
        k_BHTE: keys.
        v_BHTE: values.
        out_BHTE: the output.
        lse_BHT: natural logarithms of sums of exponentials of scaled logits; or (B, H, T, 1).
        scale: factor on the logits.

    Returns:
        (B * T, 3 * H * E) in the dtype of queries; its sums (3 * H * E,), float32, of what is not rounded yet.
    """
    batch, heads, tokens, width = q_BHTE.shape
    # Under autocast products would be of 16 bits.
    with torch.autocast(q_BHTE.device.type, enabled=False):
        grad, q, k, v, out = (x.to(torch.float32) for x in (grad_BHTE, q_BHTE, k_BHTE, v_BHTE, out_BHTE))
        p_BHTT = torch.exp(scale * (q @ k.mT) - lse_BHT.reshape(batch, heads, tokens, 1))
        delta = (grad * out).sum(-1, keepdim=True)
        grad_s = p_BHTT * (grad @ v.mT - delta)
        made = torch.stack((scale * (grad_s @ k), scale * (grad_s.mT @ q), p_BHTT.mT @ grad))
    made = made.permute(1, 3, 0, 2, 4).reshape(batch * tokens, 3 * heads * width)
    return made.to(q_BHTE.dtype), made.sum(0)
