"""Differential attention: timm's, through a backend.

Shapes: B batch, N tokens, D width, H heads, E head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from vit_efficient.attention.base import AttentionBackend
from vit_efficient.attention.modules import BackendAttention, bias_or_mask, setting


class DiffAttention(BackendAttention):
    """timm's `DiffAttention` (Differential Transformer, arXiv:2410.05258, equation 1): the difference of two softmax
    maps over the same values, which are twice as wide as the queries."""

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    sub_norm: nn.Module
    norm: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Module
    proj_drop: nn.Module
    lambda_a: Tensor  # either these two
    lambda_b: Tensor
    lambda_q1: Tensor  # or these four
    lambda_k1: Tensor
    lambda_q2: Tensor
    lambda_k2: Tensor

    def __init__(self, original: nn.Module, backend: AttentionBackend) -> None:
        super().__init__(original, backend)
        self.lambda_init: float = setting(original, "lambda_init")
        self.dual_lambda: bool = setting(original, "dual_lambda")

    def forward(self, x_BND: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        bias, mask = bias_or_mask(x_BND, attn_mask, is_causal)
        q, k, v = self.qkv(x_BND).chunk(3, dim=-1)
        q = self.q_norm(q.unflatten(-1, (self.num_heads, 2, -1)))  # B N H 2 E
        k = self.k_norm(k.unflatten(-1, (self.num_heads, 2, -1)))
        v_BHNE = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        dropout = self.attn_drop.p if self.training else 0.0
        first, second = (
            self.backend.attend(
                q[:, :, :, half].transpose(1, 2).type_as(v),
                k[:, :, :, half].transpose(1, 2).type_as(v),
                v_BHNE,
                bias=bias,
                mask=mask,
                scale=self.scale,
                dropout=dropout,
            )
            for half in (0, 1)
        )
        y_BHNE = self.sub_norm(first - self.mixing().type_as(first) * second) * (1 - self.lambda_init)
        return self.proj_drop(self.proj(self.norm(y_BHNE.transpose(1, 2).flatten(2))))

    def mixing(self) -> Tensor:
        """The weight λ of the second map, a scalar."""
        if self.dual_lambda:
            return self.lambda_a.exp() - self.lambda_b.exp() + self.lambda_init
        first = (self.lambda_q1 * self.lambda_k1).sum().float().exp()
        second = (self.lambda_q2 * self.lambda_k2).sum().float().exp()
        return first - second + self.lambda_init
