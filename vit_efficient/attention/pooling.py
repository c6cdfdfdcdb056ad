"""Pooling heads that attend: timm's, through a backend.

Shapes: B batch, N tokens, D width, H heads, E head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from vit_efficient.attention.base import AttentionBackend
from vit_efficient.attention.modules import BackendAttention, bias_or_mask, setting


class LatentPool(BackendAttention):
    """timm's `AttentionPoolLatent` (SigLIP's head): learned queries attend over all tokens."""

    latent: Tensor
    pos_embed: Tensor | None
    q: nn.Module
    kv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Module
    proj_drop: nn.Module
    norm: nn.Module
    mlp: nn.Module | None

    def __init__(self, original: nn.Module, backend: AttentionBackend) -> None:
        super().__init__(original, backend)
        self.pool: str = setting(original, "pool")
        self.without("pos_embed", "mlp")

    def forward(self, x_BND: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
        if self.pos_embed is not None:
            x_BND = x_BND + self.pos_embed.to(x_BND.dtype)
        k_BHNE, v_BHNE = self.kv(x_BND).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        latent = self.latent.expand(x_BND.shape[0], -1, -1)
        q_BHNE = self.q_norm(self.q(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        bias, mask = bias_or_mask(x_BND, attn_mask)
        y_BHNE = self.backend.attend(
            q_BHNE.type_as(v_BHNE),
            self.k_norm(k_BHNE).type_as(v_BHNE),
            v_BHNE,
            bias=bias,
            mask=mask,
            scale=self.scale,
        )
        y_BND = self.proj_drop(self.proj(y_BHNE.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            y_BND = y_BND + self.mlp(self.norm(y_BND))
        return _pooled(y_BND, self.pool)


class RefiningPool(BackendAttention):
    """timm's `AttentionPoolPrr`: attention without projections, then pooling."""

    pre_norm: nn.Module
    post_norm: nn.Module

    def __init__(self, original: nn.Module, backend: AttentionBackend) -> None:
        super().__init__(original, backend)
        self.pool: str = setting(original, "pool")

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BHNE = self.pre_norm(x_BND).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        y_BHNE = self.backend.attend(x_BHNE, x_BHNE, x_BHNE, scale=self.scale)
        return _pooled(self.post_norm(y_BHNE.transpose(1, 2).flatten(2)), self.pool)


def _pooled(x_BND: Tensor, pool: str) -> Tensor:
    if pool == "token":
        return x_BND[:, 0]
    return x_BND.mean(1) if pool == "avg" else x_BND
