"""Biases whose gradients are made late, in compiled training in 16 bits on a GPU: where the gradient is that they sum.

The gradient of a bias is the sum of its layer's output gradient, which is large: 50,432 x 4,096 for fc1 of a ViT-L at
batch 256. Compiled, it is written by one kernel and read by another. Here the kernel that writes it (behind GELU for
fc1, behind attention for qkv) sums it too: the layer adds a detached bias, and the operation after it, which is given
the same parameter, has its gradient.

Layer and operation ask `late` of tensors of the same dtype and in the same program, so either both act so or none.
Elsewhere both are PyTorch's own. Names of parameters stay.

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
    """Whether a layer that takes or gives x leaves its bias' gradient to the operation after it."""
    if not (x.is_cuda and torch.compiler.is_dynamo_compiling() and torch.is_grad_enabled()):
        return False
    return x.dtype in HALF or (torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") in HALF)


class LateBias(nn.Linear):
    """`nn.Linear` with a bias whose gradient comes from elsewhere, where it is `late`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) to (..., outputs)."""
        return F.linear(x, self.weight, self.bias.detach() if late(x) else self.bias)


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


class LateGELU(CompiledGELU):
    """`CompiledGELU` right behind a `LateBias`, whose bias' gradient it makes.

    Args:
        layer: the layer before it. Its parameter is looked up in every pass: FSDP2 puts another in its place.
    """

    def __init__(self, layer: LateBias) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple, or it would be a submodule with names in the state dict

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape to the same shape and dtype."""
        if not late(x):
            return super().forward(x)
        y: Tensor = _Gelu.apply(x, self.layer[0].bias)
        return y


def _into_heads(attention: SelfAttention, qkv: Tensor) -> Heads | None:
    """A fused projection (B, T, 3 * H * E) as queries, keys and values (B, H, T, E), if its bias is late."""
    if not late(qkv):
        return None
    assert isinstance(attention.qkv, LateBias)
    found: Heads = _Heads.apply(qkv, attention.qkv.bias, attention.num_heads)
    return found


def late_biases(model: nn.Module) -> None:
    """Let the biases of fc1 before GELU and of fused qkv be late, in place, where these are plain linear layers.

    Call it behind `shorten_gelu` and `swap_attention`, and before blocks are compiled.
    """
    for module in list(model.modules()):
        # In timm's own MLP nothing lies between fc1 and its activation.
        if type(module) is Mlp and type(module.act) is CompiledGELU and _plain(module.fc1):
            fc1: Any = module.fc1
            fc1.__class__ = LateBias
            module.act = LateGELU(fc1).train(module.act.training)
        elif isinstance(module, SelfAttention) and module.q_bias is None and _plain(module.qkv):
            assert module.qkv is not None
            module.qkv.__class__ = LateBias
            module.into_heads = _into_heads


def _plain(layer: object) -> bool:
    return type(layer) is nn.Linear and layer.bias is not None
