"""Biases whose gradients are made late, in compiled training in 16 bits on a GPU: where the gradient is that they sum.

The gradient of a bias is the sum of its layer's output gradient, which is large: 50,432 x 4,096 for fc1 of a ViT-L at
batch 256. Compiled, it is written by one kernel and read by another. Here the kernel that writes it (behind GELU for
fc1, behind attention for qkv) sums it too: the layer adds a detached bias, and the operation after it, which is given
the same parameter, has its gradient. `late` is asked once for both, so that no break of a program comes between.
Elsewhere all is PyTorch's own. Names of parameters stay.

Where sequences are short and cuDNN's attention is the fastest, on Hopper, its backward pass is a kernel of this package
too, which writes the gradient of qkv, and those sums, by itself (`kernels/attention_gradient`).

Shapes: B batch, T tokens, H heads, E head width.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention.base import AttentionBackend
from vit_efficient.attention.modules import Arguments, SelfAttention
from vit_efficient.attention.sdpa import takes_cudnn
from vit_efficient.kernels.attention_gradient.op import attention_gradient, fits
from vit_efficient.kernels.bias_gradient.op import gelu_gradient, heads_gradient
from vit_efficient.kernels.capability import compute_capability
from vit_efficient.model.gelu import HALF, CompiledGELU, values

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values


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


def _split(qkv_BTC: Tensor, heads: int) -> Heads:
    """Views (B, H, T, E) of a fused projection's output."""
    q_BHTE, k_BHTE, v_BHTE = qkv_BTC.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q_BHTE, k_BHTE, v_BHTE


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, heads: int) -> Heads:  # type: ignore[no-untyped-def]
        ctx.shape, ctx.dtype = qkv.shape, bias.dtype
        return _split(qkv, heads)

    @staticmethod
    def backward(ctx, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        made, sums = heads_gradient(q, k, v)
        return made.view(ctx.shape), sums.to(ctx.dtype), None


def _attend(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's attention: its output, and the logarithms of sums that its backward pass wants."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    found = attend(q_BHTE, k_BHTE, v_BHTE, None, compute_log_sumexp=True, scale=scale)
    return found[0], found[1]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor, heads: int, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.heads, ctx.scale, ctx.dtype = heads, scale, bias.dtype
        out_BHTE, lse = _attend(*_split(qkv, heads), scale)
        ctx.save_for_backward(qkv, out_BHTE, lse)
        return out_BHTE.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        qkv, out_BHTE, lse = ctx.saved_tensors
        grad_BHTE = grad.unflatten(-1, (ctx.heads, -1)).transpose(1, 2)
        made, sums = attention_gradient(grad_BHTE, *_split(qkv, ctx.heads), out_BHTE, lse, ctx.scale)
        return made.view(qkv.shape), sums.to(ctx.dtype), None, None


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


def _attended(attention: SelfAttention, x_BTD: Tensor, given: Arguments) -> Tensor | None:
    """From the block's normed input to what attention gives (B, T, H * E), if the bias of qkv is late."""
    if not late(x_BTD):
        return None
    qkv: Any = attention.qkv  # `_plain`
    made, heads = F.linear(x_BTD, qkv.weight, qkv.bias.detach()), attention.num_heads
    if _alone(attention, given) and _short(attention.backend, made, heads):
        y_BTC: Tensor = _Attention.apply(made, qkv.bias, heads, attention.scale)
        return y_BTC
    q_BHTE, k_BHTE, v_BHTE = _Heads.apply(made, qkv.bias, heads)
    return attention.attend_heads(q_BHTE, k_BHTE, v_BHTE, **given)


def _alone(attention: SelfAttention, given: Arguments) -> bool:
    """Whether nothing but attention itself lies between the projections, and no weights of it are dropped."""
    norms = () if attention.q_norm is None else (attention.q_norm, attention.k_norm)
    return (
        all(one is None for one in given.values())
        and all(type(norm) is nn.Identity and not _hooked(norm) for norm in norms)
        and attention.num_kv_heads == attention.num_heads
        and attention.padding is None
        and not (attention.training and attention.attn_drop.p > 0)
    )


def _short(backend: AttentionBackend, qkv_BTC: Tensor, heads: int) -> bool:
    """Whether the backward pass of attention has a kernel of this package, behind a forward pass of cuDNN's."""
    q_BHTE, k_BHTE, v_BHTE = _split(qkv_BTC, heads)
    return fits(q_BHTE) and takes_cudnn(backend, q_BHTE, k_BHTE, v_BHTE) and _timed(qkv_BTC.device.index)


@torch.compiler.assume_constant_result
def _timed(index: int | None) -> bool:
    """Whether a GPU is of the kind that the kernel was timed on; a constant of the program."""
    return compute_capability(index)[0] == 9


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
            module.attended = _attended


def _plain(layer: object) -> bool:
    """Whether nothing but a product and a bias is behind a call of this layer."""
    return type(layer) is nn.Linear and layer.bias is not None and not _hooked(layer)


def _hooked(layer: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(layer, name) for name in hooks)
