"""Stochastic depth that saves what it drops, and whose rate is a tensor.

Huang et al., Deep Networks with Stochastic Depth, ECCV 2016. Two ways to do it in training:

- ``mask``, as timm does: a branch runs for all samples, and its result is multiplied by 0 for those that are dropped.
- ``subset``: a branch runs only for the samples that keep it, a random part of the batch, so that time and memory fall
  by about the mean rate (Oquab et al., DINOv2, section 5, "Efficient stochastic depth"). There the part is rounded down
  and the scale follows it. Here it is rounded up or down at random, each branch for itself, so rates hold exactly at
  every batch; at one image it is what a mask does.

timm's `DropPath` holds a number, which `torch.compile` takes for a constant: each of ViT-L's 24 blocks was compiled
anew, for minutes, or ran eager where the compiler's limit was reached. Here rate and samples are data, the number of
samples is dynamic, and equal blocks are one program. Blocks at rate 0 take part, and drop nothing.

Shapes: B batch, K samples that keep a branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from vit_efficient.model.samples import put_copied, put_gathered, scaled, take

# x + drop_path1(f(norm1(x))), then x + drop_path2(g(norm2(x))), and nothing else sees x.
BLOCKS = (vision_transformer.Block, eva.EvaBlock, beit.Block, vision_transformer_relpos.RelPosBlock)
BRANCHES = (("norm1", "drop_path1"), ("norm2", "drop_path2"))
SHARES = 16  # parts that a batch is cut into, about, of which a branch keeps some: few sizes, so that memory is reused


@dataclass(frozen=True)
class Kept:
    """The samples that keep a branch in one pass.

    Args:
        chosen: which, (K,).
        rank: of each sample, its place among all, (B,); the first K are `chosen`.
        scale: that their results are multiplied by.
        number: the same; a compiler must not see it, for which it would be a constant.
    """

    chosen: Tensor
    rank: Tensor
    scale: Tensor
    number: float


class StochasticDepth(nn.Module):
    """Drop a residual branch of whole samples in training, and scale those that stay by 1 / (1 - rate).

    Args:
        rate: probability that a sample's branch is dropped, in [0, 1).
    """

    scale: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"stochastic depth: a rate of {rate} is not in [0, 1)")
        self.rate = rate  # read outside of compiled programs only
        self.register_buffer("scale", torch.tensor(1 / (1 - rate), dtype=torch.float32), persistent=False)
        self.kept: Kept | None = None  # in a pass of the model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StochasticDepth:
        """The scale stays what it is where a model is cast to 16 bits."""
        super()._apply(fn, recurse)
        self.scale = torch.full_like(self.scale, 1 / (1 - self.rate), dtype=torch.float32)
        return self

    def keep(self, chosen_K: Tensor, rank_B: Tensor) -> None:
        """Until `kept` is None again, run the branch for these samples only.

        No sample at all would leave weights without gradients, which DDP and ZeRO wait for: one is run, times 0.
        """
        count = chosen_K.shape[0]
        if count == 0:
            chosen_K = rank_B.argmin(keepdim=True)
        torch._dynamo.maybe_mark_dynamic(chosen_K, 0)
        number = 1 / (1 - self.rate) if count else 0.0
        self.kept = Kept(chosen_K, rank_B, self.scale if count else torch.zeros_like(self.scale), number)

    def take(self, first: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Before the branch's first module: of x (B, ...) the samples that keep the branch, (K, ...)."""
        kept = self.kept if self.training else None  # in this order: a program for evaluation asks for no more
        if kept is None:
            return None
        x = inputs[0]
        return (take(x, kept.chosen, kept.rank), *inputs[1:])

    def forward(self, x: Tensor) -> Tensor:
        """A branch's result, x (B, ...), or (K, ...) of those that keep it, to (B, ...) in the same dtype."""
        if not self.training:
            return x
        kept = self.kept
        if kept is not None and torch.compiler.is_compiling():
            return put_gathered(x, kept.chosen, kept.rank, kept.scale)
        if kept is not None:
            return put_copied(x, kept.chosen, kept.rank.shape[0], kept.number)
        stays = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) * self.scale < 1
        if torch.compiler.is_compiling():
            return scaled(x, stays * self.scale)
        return (x * stays.to(x.dtype)).mul_(1 / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


def is_of_training(hook: object) -> bool:
    """Whether a forward hook is one of those here, which do nothing in evaluation."""
    return getattr(hook, "__func__", None) is StochasticDepth.take


class Subsets:
    """Chooses, for every training pass of a model, which samples each branch is run for.

    A part of the model that is called by itself, `forward_features` for example, has masks.

    Args:
        depths: of the branches.
    """

    def __init__(self, depths: list[StochasticDepth]) -> None:
        self.depths = depths

    @torch.compiler.disable
    def draw(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before the model's forward pass, of images (B, ...): PyTorch's random numbers decide."""
        if not model.training:
            return
        images_B = args[0] if args else next(iter(named.values()))
        batch = images_B.shape[0]
        up = torch.rand(len(self.depths), device="cpu")
        # A pretended pass has no numbers, only sizes.
        counts = self.counts(batch, [0.5] * len(up) if isinstance(up, FakeTensor) else up.tolist())
        order = torch.rand(len(counts), batch, device=images_B.device).argsort(1)
        ranks = order.argsort(1)
        for depth, count, order_B, rank_B in zip(self.depths, counts, order.unbind(), ranks.unbind(), strict=True):
            depth.keep(order_B[:count], rank_B)

    @torch.compiler.disable
    def forget(self, model: nn.Module, *_: Any) -> None:
        """Behind that pass, or its error. Blocks that are run again for the backward pass have kept what they had."""
        for depth in self.depths:
            depth.kept = None

    def counts(self, batch: int, up: list[float]) -> list[int]:
        """How many samples keep each branch: on average over `up` in [0, 1), just its share of the batch."""
        share = max(1, batch // SHARES)
        if any((1 - depth.rate) * batch < batch % share for depth in self.depths):
            share = 1
        rest = batch % share  # which all branches keep, so that the others are whole shares
        return [
            rest + share * math.floor(((1 - depth.rate) * batch - rest) / share + above)
            for depth, above in zip(self.depths, up, strict=True)
        ]


def install(model: nn.Module, how: str) -> None:
    """Put `StochasticDepth` in place of every `DropPath`, in place; beside one, also where a block's rate is 0.

    Args:
        model: of timm.
        how: ``subset``, for blocks that are known to let each sample go its own way, `BLOCKS`; or ``mask``. Positions
            of a sample's own (rotary, with patches left out) are not known to a branch, so such a model has masks.
    """
    if not any(isinstance(module, DropPath) for module in model.modules()):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DropPath) and child.scale_by_keep:
                rate = child.drop_prob
            elif type(child) is nn.Identity and name.startswith("drop_path"):
                rate = 0.0
            else:
                continue
            setattr(parent, name, StochasticDepth(rate).train(child.training))
    left_out = any(
        getattr(m, "prob", 0) for m in model.modules() if isinstance(m, PatchDropout | PatchDropoutWithIndices)
    )
    if how == "subset" and not left_out:
        _run_subsets(model)


def _run_subsets(model: nn.Module) -> None:
    depths = []
    for block in model.modules():
        for first, last in BRANCHES if type(block) in BLOCKS else ():
            depth = block.get_submodule(last)
            if isinstance(depth, StochasticDepth):
                block.get_submodule(first).register_forward_pre_hook(depth.take)
                depths.append(depth)
    if depths:
        subsets = Subsets(depths)
        model.register_forward_pre_hook(subsets.draw, with_kwargs=True)
        model.register_forward_hook(subsets.forget, always_call=True)
