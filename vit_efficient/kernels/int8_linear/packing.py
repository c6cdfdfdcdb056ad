"""Two 4-bit codes in a byte."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(q: Tensor, offset: Tensor | int = 8) -> Tensor:
    """Codes (..., K) int8 as (..., ceil(K / 2)) uint8: the even one in the low half, each plus its offset, 0 .. 15."""
    q = F.pad(q + offset, (0, q.shape[-1] % 2))
    return (q[..., 0::2] | (q[..., 1::2] << 4)).view(torch.uint8)


def unpack(packed: Tensor, inputs: int, offset: Tensor | int = 8) -> Tensor:
    """Codes (..., K) int8 from what `pack` made with the same offset; `inputs` is K."""
    both = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return both.view(torch.int8)[..., :inputs] - offset
