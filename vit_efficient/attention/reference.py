"""The definition of attention, in plain PyTorch: what every backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q_BHNE: Tensor,
    k_BHNE: Tensor,
    v_BHNE: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float,
) -> Tensor:
    """``softmax(scale q kᵀ + bias) v`` in the dtype of its inputs (Vaswani et al., 2017, arXiv:1706.03762, equation 1).

    Args and result are those of `AttentionBackend.attend`, without dropout.
    """
    logits_BHNN = scale * (q_BHNE @ k_BHNE.transpose(-2, -1))
    if bias is not None:
        logits_BHNN = logits_BHNN + bias
    if mask is not None:
        logits_BHNN = logits_BHNN.masked_fill(~mask, float("-inf"))
    return torch.softmax(logits_BHNN, dim=-1) @ v_BHNE
