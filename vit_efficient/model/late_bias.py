"""Biases whose gradients are made late, in compiled training in 16 bits on a GPU: where the gradient is that they sum.

The gradient of a bias is the sum of its layer's output gradient, which is large: 50,432 x 4,096 for fc1 of a ViT-L at
batch 256. Compiled, it is written by one kernel and read by another. Here the kernel that writes it (behind GELU for
fc1, behind attention for qkv) sums it too: the layer adds a detached bias, and the operation after it, which is given
the same parameter, has its gradient. `late` is asked once for both, so that no break of a program comes between.
Elsewhere all is PyTorch's own. Names of parameters stay.

Shapes: B batch, T tokens, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention.modules import Heads, SelfAttention
from vit_efficient.kernels.bias_gradient.op import gelu_gradient, heads_gradient
from vit_efficient.model.gelu import HALF, CompiledGELU, values


def late(x: Tensor) -> bool:
    """Whether a layer that takes x leaves its bias' gradient to the operation after it."""
    if not (x.is_cuda and torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()):
        return False
    return x.dtype in HALF or (torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") in HALF)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.dtype = bias.dtype
        return values(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        width = x.shape[-1]
        made, sums = gelu_gradient(grad.reshape(-1, width), x.reshape(-1, width))
        return made.view(x.shape), sums.to(ctx.dtype)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, heads: int) -> Heads:  # type: ignore[no-untyped-def]
        ctx.shape, ctx.dtype = qkv.shape, bias.dtype
        q_BHTE, k_BHTE, v_BHTE = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q_BHTE, k_BHTE, v_BHTE

    @staticmethod
    def backward(ctx, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        made, sums = heads_gradient(q, k, v)
        return made.view(ctx.shape), sums.to(ctx.dtype), None


class LateMlp(Mlp):
    """timm's MLP, whose first bias has its gradient made behind GELU, where it is `late`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, inputs) to (B, T, outputs)."""
        if late(x):
            h = _Gelu.apply(F.linear(x, self.fc1.weight, self.fc1.bias.detach()), self.fc1.bias)
        else:
            h = self.act(self.fc1(x))
        y: Tensor = self.drop2(self.fc2(self.norm(self.drop1(h))))
        return y


def _into_heads(attention: SelfAttention, x_BTD: Tensor) -> Heads | None:
    """The block's normed input as queries, keys and values (B, H, T, E), if the bias of that projection is late."""
    if not late(x_BTD):
        return None
    qkv: Any = attention.qkv  # `_plain`
    found: Heads = _Heads.apply(F.linear(x_BTD, qkv.weight, qkv.bias.detach()), qkv.bias, attention.num_heads)
    return found


def late_biases(model: nn.Module) -> None:
    """Let the biases of fc1 before GELU and of fused qkv be late, in place, where these are plain linear layers.

    Call it behind `shorten_gelu` and `swap_attention`, and before blocks are compiled. Parameters must lie in their
    layers throughout a block's forward pass: FSDP2 gathers those of whole blocks, ZeRO 3 each layer's for itself. Hooks
    that are put on these layers later are not called where biases are late.
    """
    for module in list(model.modules()):
        # In timm's own MLP nothing lies between fc1 and its activation.
        if type(module) is Mlp and type(module.act) is CompiledGELU and _plain(module.fc1):
            module.__class__ = LateMlp
        elif isinstance(module, SelfAttention) and module.q_bias is None and _plain(module.qkv):
            module.into_heads = _into_heads


def _plain(layer: object) -> bool:
    """Whether nothing but a product and a bias is behind a call of this layer."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(layer) is nn.Linear and layer.bias is not None and not any(getattr(layer, name) for name in hooks)
