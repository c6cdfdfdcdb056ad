"""How a model is spread over devices, and what that costs each of them in memory: shards, and buffers to move them.

A value of its own, so that memory and time can be asked of machines and strategies that no recipe names yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vit_efficient.parallel.config import ZERO_BUCKET

Kind = Literal["single", "ddp", "fsdp", "deepspeed"]


@dataclass(frozen=True)
class Layout:
    """Devices and what each holds.

    Args:
        kind: as a recipe's `strategy.name`, but for `auto`.
        devices: of each node.
        nodes: how many.
        hybrid: of `fsdp`, shards over a node's devices only, with a copy on each node.
        stage: of `deepspeed`: optimizer states (1), gradients too (2), parameters too (3) are sharded.
        offload_states: gradients (of `fsdp`) and optimizer states lie in the host's memory.
        offload_weights: sharded parameters as well.
        bucket: of `deepspeed`, the numbers that are reduced at once; it allocates two buffers of them.
    """

    kind: Kind = "single"
    devices: int = 1
    nodes: int = 1
    hybrid: bool = False
    stage: int = 0
    offload_states: bool = False
    offload_weights: bool = False
    bucket: int = ZERO_BUCKET

    @classmethod
    def of(cls, strategy: Any, devices: int = 1) -> Layout:
        """The layout of a recipe's strategy; `devices` where it leaves that to the machine."""
        kind: Kind = strategy.name if strategy.name != "auto" else "ddp" if devices > 1 else "single"
        if kind == "single":
            return cls()
        own = getattr(strategy, "devices", devices)
        offload = bool(getattr(strategy, "offload", False))
        return cls(
            kind=kind,
            devices=devices if own == "auto" else own,
            nodes=getattr(strategy, "nodes", 1),
            hybrid=getattr(strategy, "shard", "full") == "hybrid",
            stage=getattr(strategy, "stage", 0),
            offload_states=offload or bool(getattr(strategy, "offload_optimizer", False)),
            offload_weights=offload or bool(getattr(strategy, "offload_parameters", False)),
        )

    @property
    def world(self) -> int:
        """Devices in all."""
        return self.devices * self.nodes

    @property
    def shards(self) -> int:
        """Parts that what is sharded is cut into."""
        if self.kind not in ("fsdp", "deepspeed"):
            return 1
        return self.devices if self.hybrid else self.world

    @property
    def shards_weights(self) -> bool:
        return self.kind == "fsdp" or self.stage == 3

    @property
    def shards_gradients(self) -> bool:
        return self.kind == "fsdp" or self.stage >= 2

    @property
    def keeps_gradients(self) -> bool:
        """Whether memory for all gradients is held throughout: DDP's buckets, of which they are views."""
        return self.kind == "ddp" and self.world > 1

    def part(self, size: int, sharded: bool) -> int:
        """Bytes of a device's share, rounded up as padding does."""
        return -(-size // self.shards) if sharded else size

    def __str__(self) -> str:
        parts: list[str] = [self.kind]
        if self.kind == "deepspeed":
            parts.append(f"ZeRO {self.stage}")
        if self.kind == "fsdp":
            parts.append("hybrid" if self.hybrid else "full")
        if self.offload_states:
            parts.append("offload" if self.offload_weights or self.kind == "fsdp" else "optimizer offload")
        where = f"{self.nodes} x {self.devices}" if self.nodes > 1 else f"{self.devices}"
        return f"{' '.join(parts)} on {where}" if self.world > 1 else " ".join(parts)


@dataclass(frozen=True)
class Weights:
    """What a model holds, in bytes and numbers.

    Args:
        size: bytes of all weights and buffers, 4-bit scales included.
        frozen: bytes of those that are not trained.
        trained: numbers that are trained; float32.
        block: bytes of the largest block, as it is gathered.
        block_trained: numbers in it that are trained.
        rest: bytes outside the blocks.
        unit: bytes of the largest unit of blocks that FSDP2 gathers at once, as it is gathered.
        kept: bytes of all blocks, as they are gathered, if they may stay so until the backward pass; else 0.
        unit_trained: numbers in that unit that are trained.
    """

    size: int
    frozen: int
    trained: int
    block: int
    block_trained: int
    rest: int
    unit: int
    kept: int
    unit_trained: int


def held(layout: Layout, weights: Weights) -> int:
    """Bytes of weights that lie on a device all the time. DeepSpeed keeps a second float32 copy of its part."""
    own = 0 if layout.offload_weights else layout.part(weights.size, layout.shards_weights)
    if layout.kind == "deepspeed" and not layout.offload_states:
        own += layout.part(4 * weights.trained, True)
    return own


def gradients(layout: Layout, weights: Weights) -> int:
    """Bytes of the gradients that lie on a device between backward passes and the optimizer's step."""
    if layout.kind == "fsdp" and layout.offload_states:
        return 0
    if layout.kind == "deepspeed" and layout.stage == 2 and layout.offload_states:
        return 0
    return layout.part(4 * weights.trained, layout.shards_gradients)


def states(layout: Layout, size: int) -> int:
    """A device's part of optimizer states (or of a moving average) of `size` bytes."""
    return 0 if layout.offload_states else layout.part(size, layout.kind in ("fsdp", "deepspeed"))


def stays_gathered(layout: Layout, weights: Weights) -> bool:
    """Whether blocks are gathered once for both passes, which FSDP2 does alone, and not where memory is all."""
    return layout.kind == "fsdp" and not layout.offload_weights and weights.kept > 0


def buffers(layout: Layout, weights: Weights) -> int:
    """Bytes that moving weights and gradients takes, at most at once.

    - ddp: none. The gradients are views of the reducer's buckets (`gradient_as_bucket_view`).
    - fsdp: the unit at work gathered and the next one gathered ahead, and the flat buffer that one is copied out of;
      what is outside the blocks, gathered throughout; a unit's gradients, and two float32 buffers of the
      reduce-scatter: one filled, one on its way (`torch.distributed.fsdp`, `fully_shard`'s notes on overlap). Where
      all units are kept until the backward pass, `_kept`.
    - deepspeed: two reduce buckets; with stage 3, blocks gathered likewise.
    """
    if layout.world == 1 or layout.kind == "ddp":
        return 0
    if layout.kind == "fsdp":
        if stays_gathered(layout, weights):
            return _kept(weights) + weights.rest
        return 3 * weights.unit + weights.rest + 4 * weights.unit_trained * 3
    return (3 * weights.block + weights.rest if layout.stage == 3 else 0) + 2 * 4 * layout.bucket


def _kept(weights: Weights) -> int:
    """Bytes for units that stay gathered: in the forward pass all, and the flat buffer that the last is copied out of;
    in the backward pass what is left of them, a unit's gradients in the dtype of its weights, and what is on its way of
    those before it, in float32."""
    made, sent = min(weights.unit, 4 * weights.unit_trained), 4 * weights.unit_trained
    units = -(-weights.kept // max(1, weights.unit))
    behind = (max(0, weights.kept - done * weights.unit) + made + min(done, 2) * sent for done in range(units))
    return max(weights.kept + weights.unit, made + sent, *behind)
