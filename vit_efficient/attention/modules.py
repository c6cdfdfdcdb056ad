"""Attention modules that take over the parts of timm's, under the same names, and attend through a backend.

Every projection runs as its submodule (`self.qkv(x)`), never through its bare weight, so that a quantized layer or an
adapter in its place takes effect.

Shapes: B batch, N tokens, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from vit_efficient.attention.base import AttentionBackend

if TYPE_CHECKING:
    from vit_efficient.attention.padding import TokenPadding


class Arguments(TypedDict):
    """What `SelfAttention.attend_heads` takes besides queries, keys and values."""

    rope: Tensor | None
    bias: Tensor | None
    mask: Tensor | None


class BackendAttention(nn.Module):
    """Parameters, buffers and submodules of `original`, in the same order; attention itself by `backend`.

    Args:
        original: a timm attention module; it must not be used afterwards.
        backend: computes the attention.
    """

    num_heads: int
    scale: float

    def __init__(self, original: nn.Module, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend = backend
        self.replaces = type(original).__name__
        for name, parameter in original._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in original._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in original._non_persistent_buffers_set)
        for name, module in original._modules.items():
            self.add_module(name, module)
        self.num_heads = setting(original, "num_heads")
        self.scale = setting(original, "scale")
        self.train(original.training)

    def without(self, *names: str) -> None:
        """Parts that `original` may lack become None."""
        for name in names:
            if not hasattr(self, name):
                setattr(self, name, None)

    @property
    def head_width(self) -> int:
        """E of the queries."""
        return round(self.scale**-2)

    @property
    def needs_bias(self) -> bool:
        """Whether the backend must be able to add a bias to the logits."""
        return False

    def extra_repr(self) -> str:
        return f"{self.replaces}, heads={self.num_heads}, backend={self.backend.name}"


class SelfAttention(BackendAttention):
    """timm's `Attention`, `AttentionRope` and `EvaAttention`: fused or split projections, optional query and key
    norms, rotary positions, grouped keys and values, inner norm and output gate."""

    qkv: nn.Module | None  # fused; or else the three that follow
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_bias: Tensor | None  # with k_bias (a buffer of zeros) and v_bias, where the fused projection has none
    k_bias: Tensor
    v_bias: Tensor
    q_norm: nn.Module | None
    k_norm: nn.Module
    norm: nn.Module | None
    gate: nn.Module | None
    attn_drop: nn.Dropout
    proj: nn.Module
    proj_drop: nn.Module
    padding: TokenPadding | None = None  # where sequences are filled up: which tokens can be looked at
    # In place of `project` and `attend_heads`, where it can.
    attended: Callable[[SelfAttention, Tensor, Arguments], Tensor | None] | None = None

    def __init__(self, original: nn.Module, backend: AttentionBackend) -> None:
        super().__init__(original, backend)
        self.num_kv_heads: int = getattr(original, "num_kv_heads", self.num_heads)
        self.num_prefix_tokens: int = getattr(original, "num_prefix_tokens", 0)
        self.rotate_half: bool = getattr(original, "rotate_half", False)
        self.without("qkv", "q_bias", "q_norm", "norm", "gate")

    def forward(
        self,
        x_BND: Tensor,
        *,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return self.compute(x_BND, **self.arguments(x_BND, rope=rope, attn_mask=attn_mask, is_causal=is_causal))

    def arguments(
        self,
        x_BND: Tensor,
        *,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Arguments:
        """What `forward` is called with besides x, as `attend_heads` takes it."""
        bias, mask = bias_or_mask(x_BND, attn_mask, is_causal)
        return {"rope": rope, "bias": bias, "mask": mask}

    def compute(
        self, x_BND: Tensor, *, rope: Tensor | None = None, bias: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The whole layer, from the block's normed input (B, N, D) to its output (B, N, D)."""
        given: Arguments = {"rope": rope, "bias": bias, "mask": mask}
        y_BND = None if self.attended is None else self.attended(self, x_BND, given)
        if y_BND is None:
            y_BND = self.attend_heads(*self.project(x_BND), **given)
        if self.norm is not None:
            y_BND = self.norm(y_BND)
        if self.gate is not None:
            y_BND = y_BND * self.gate(x_BND).sigmoid()
        return self.proj_drop(self.proj(y_BND))

    def attend_heads(
        self,
        q_BHNE: Tensor,
        k_BHNE: Tensor,
        v_BHNE: Tensor,
        *,
        rope: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What lies between the projections: norms of queries and keys, rotation, attention; (B, N, H * E)."""
        if self.q_norm is not None:
            q_BHNE, k_BHNE = self.q_norm(q_BHNE), self.k_norm(k_BHNE)
        if rope is not None:
            q_BHNE, k_BHNE = self.rotate(q_BHNE, rope), self.rotate(k_BHNE, rope)
        # Norms and rotations may have gone up to float32 under autocast; a backend wants one dtype.
        q_BHNE, k_BHNE = q_BHNE.type_as(v_BHNE), k_BHNE.type_as(v_BHNE)
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            k_BHNE = k_BHNE.repeat_interleave(groups, dim=1)
            v_BHNE = v_BHNE.repeat_interleave(groups, dim=1)
        if self.padding is not None:
            k_BHNE, v_BHNE, bias, mask = self.padding.readable(k_BHNE, v_BHNE, bias, mask)
        dropout = self.attn_drop.p if self.training else 0.0
        y_BHNE = self.backend.attend(q_BHNE, k_BHNE, v_BHNE, bias=bias, mask=mask, scale=self.scale, dropout=dropout)
        return y_BHNE.transpose(1, 2).flatten(2)

    def project(self, x_BND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, N, E)."""
        if self.qkv is None:
            return self.split_heads(self.q_proj(x_BND), self.k_proj(x_BND), self.v_proj(x_BND))
        qkv, bias = self.qkv(x_BND), self.separate_bias()
        return self.split_heads(qkv if bias is None else qkv + bias.to(qkv.dtype))

    def separate_bias(self) -> Tensor | None:
        """(3 * H * E,), added to the fused projection: EVA and BEiT hold biases apart, because keys have none."""
        return None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))

    def split_heads(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One fused projection (B, N, 3 * H * E), or three, as queries, keys and values, each (B, H, N, E)."""
        if len(projected) == 1:
            q_BHNE, k_BHNE, v_BHNE = (
                projected[0].unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            )
            return q_BHNE, k_BHNE, v_BHNE
        q, k, v = projected
        return (
            q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2),
            k.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2),
            v.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2),
        )

    def rotate(self, x_BHNE: Tensor, rope: Tensor) -> Tensor:
        """Rotary position embedding on the patch tokens; class and register tokens and padding have no position."""
        first = self.num_prefix_tokens
        last = x_BHNE.shape[2] if self.padding is None else self.padding.real or x_BHNE.shape[2]
        patches = apply_rot_embed_cat(x_BHNE[:, :, first:last], rope, half=self.rotate_half)
        return torch.cat((x_BHNE[:, :, :first], patches, x_BHNE[:, :, last:]), dim=2)


class BeitAttention(SelfAttention):
    """timm's `beit.Attention`: a learned bias for every relative position, of its own or shared by all blocks."""

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor

    def __init__(self, original: nn.Module, backend: AttentionBackend) -> None:
        super().__init__(original, backend)
        self.without("relative_position_bias_table")

    @property
    def needs_bias(self) -> bool:
        return self.relative_position_bias_table is not None

    def forward(self, x_BND: Tensor, *, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.compute(x_BND, **self.arguments(x_BND, shared_rel_pos_bias=shared_rel_pos_bias))

    def arguments(  # type: ignore[override]
        self, x_BND: Tensor, *, shared_rel_pos_bias: Tensor | None = None
    ) -> Arguments:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own_HNN = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
            bias = own_HNN.unsqueeze(0) if bias is None else own_HNN.unsqueeze(0) + bias
        return {"rope": None, "bias": bias, "mask": None}


class RelPosAttention(SelfAttention):
    """timm's `RelPosAttention`: a relative position bias from a table or a small network, its own or shared."""

    rel_pos: Any

    def __init__(self, original: nn.Module, backend: AttentionBackend) -> None:
        super().__init__(original, backend)
        self.without("rel_pos")

    @property
    def needs_bias(self) -> bool:
        return True

    def forward(self, x_BND: Tensor, *, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.compute(x_BND, **self.arguments(x_BND, shared_rel_pos=shared_rel_pos))

    def arguments(  # type: ignore[override]
        self, x_BND: Tensor, *, shared_rel_pos: Tensor | None = None
    ) -> Arguments:
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return {"rope": None, "bias": bias, "mask": None}


def bias_or_mask(
    x_BND: Tensor, attn_mask: Tensor | None, is_causal: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """timm's one mask argument, boolean or additive, as (bias, mask). `is_causal` takes its place, as in PyTorch."""
    if is_causal:
        tokens = x_BND.shape[1]
        attn_mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x_BND.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return None, attn_mask
    return attn_mask, None


def setting(original: nn.Module, name: str) -> Any:
    """A plain attribute of a timm module, whose type mypy takes for a tensor or a module."""
    return getattr(original, name)
