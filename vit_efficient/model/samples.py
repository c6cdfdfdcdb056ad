"""Some samples of a batch, taken out and put back: by gathers in a compiled program, by copies where nothing is fused.

Both ways a sample has one source, so that nothing is summed in an order of chance; and a scale is applied at least in
float32: 1 / 0.9, rounded to bf16, would be 0.15 % too small for every sample.

Shapes: B batch, K samples that are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor


def take(x: Tensor, chosen_K: Tensor, rank_B: Tensor) -> Tensor:
    """x (B, ...) to (K, ...).

    Args:
        x: of all samples.
        chosen_K: which to take.
        rank_B: of each sample, its place among all; the first K are `chosen_K`.
    """
    y: Tensor = _Gathered.apply(x, chosen_K, rank_B) if torch.compiler.is_compiling() else _Copied.apply(x, chosen_K)
    return y


def put_gathered(y: Tensor, chosen_K: Tensor, rank_B: Tensor, scale: Tensor) -> Tensor:
    """For a compiler: y (K, ...), scaled by a tensor of one number, to (B, ...), 0 for all others."""
    x: Tensor = _PutGathered.apply(y, chosen_K, rank_B, scale)
    return x


def put_copied(y: Tensor, chosen_K: Tensor, batch: int, scale: float) -> Tensor:
    """The same outside of compiled programs, where every operation reads and writes memory."""
    x: Tensor = _PutCopied.apply(y, chosen_K, batch, scale)
    return x


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chosen_K: Tensor, rank_B: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(chosen_K, rank_B)
        return x.index_select(0, chosen_K)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        chosen_K, rank_B = ctx.saved_tensors
        return _spread(grad, chosen_K, rank_B), None, None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, chosen_K: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(chosen_K)
        ctx.batch = x.shape[0]
        return x.index_select(0, chosen_K)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        (chosen_K,) = ctx.saved_tensors
        return grad.new_zeros(ctx.batch, *grad.shape[1:]).index_copy_(0, chosen_K, grad), None


class _PutGathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, chosen_K: Tensor, rank_B: Tensor, scale: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(chosen_K, scale)
        return _spread(scaled(y, scale), chosen_K, rank_B)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        chosen_K, scale = ctx.saved_tensors
        return scaled(grad.index_select(0, chosen_K), scale), None, None, None


class _PutCopied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, chosen_K: Tensor, batch: int, scale: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(chosen_K)
        ctx.scale = scale
        return y.new_zeros(batch, *y.shape[1:]).index_copy_(0, chosen_K, y * scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (chosen_K,) = ctx.saved_tensors
        return grad.index_select(0, chosen_K).mul_(ctx.scale), None, None, None


def _spread(y: Tensor, chosen_K: Tensor, rank_B: Tensor) -> Tensor:
    """(K, ...) to (B, ...): each sample's own, and 0 for those that are not among the K."""
    kept = chosen_K.shape[0]
    stays = (rank_B < kept).view(-1, *(1,) * (y.ndim - 1))
    return torch.where(stays, y.index_select(0, rank_B.clamp_max(kept - 1)), 0)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x times a tensor that broadcasts, in x's dtype."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * scale).to(x.dtype)
