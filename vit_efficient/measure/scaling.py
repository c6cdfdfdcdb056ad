"""How long a training step takes on many GPUs: a small model, calibrated on one and on two.

One device's step is counted (`work`) and divided by rates; what moves between devices is counted (`layout`) and divided
by bandwidths; loading, evaluation and checkpoints are added. Every constant has a meaning and a source, here and in
docs/scaling.md, which also holds the predictions against what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vit_efficient.measure.gpus import GpuKind
from vit_efficient.measure.layout import Layout, Weights, stays_gathered
from vit_efficient.measure.work import Work

# Calibrated on ViT-L/16 on one H200 (docs/scaling.md, "constants"):
EAGER = 0.835  # share of a copy's bandwidth that elementwise kernels reach: from 941 images/s eager, 128 at once
FUSED = 0.5  # share of their time that is left after compilation: from 1,180 images/s compiled, 256 at once
STEP = 2e-3 * 707e12  # half-precision operations' worth of a step that no image causes: from 1,284 at 128, 1,326 at 256
OWN = 0.6  # of SDPA's time for attention, where its backward pass is this package's: 11.2 ms of 18.7, 128 images
LAUNCH = 13e-6  # seconds from one kernel's launch to the next, eager: from 5.8 ms for one image forward
ADAPTED = 44e-6  # the same through bitsandbytes' and peft's Python: from QLoRA's 134 ms a step of 32 images
CONTENTION = 0.07  # of the step, once there are two: NCCL's kernels beside the others, waiting for the slower GPU
OVERLAPPED = 2 / 3  # of a step is backward (and, for shards, forward too), and hides what moves
LINK = 0.8  # share of a link's bandwidth that NCCL reaches in large messages (its own figures of busbw)
HOP_NEAR, HOP_FAR = 3e-6, 15e-6  # seconds a hop: in a node, between nodes

IMAGES_A_CORE = 600.0  # decoded and augmented by one loader process: docs/data.md, 9,385/s from 15
DISK = 1e9  # bytes/s to one file, assumed


def compute_seconds(work: Work, kind: GpuKind, *, compiled: bool, adapted: bool = False) -> float:
    """One device's forward and backward pass: what the arithmetic takes, or what launching it takes.

    ``max(P / R + h A / R_A + f traffic / B + c, launches * t)``, with the products P at the rate of their dtype;
    h is OWN for short attention compiled on Hopper, f is FUSED where compiled, and both are 1 elsewhere.
    """
    products = work.half / kind.half + work.full / kind.full + work.int8 / kind.int8
    traffic = work.traffic / (kind.copy * EAGER) * (FUSED if compiled else 1.0)
    own = work.short if compiled and kind.capability[0] == 9 else 0.0  # `model/late_bias.py`
    attention = (work.attention - own + OWN * own) / kind.attention
    busy = products + attention + traffic + STEP / kind.half
    return max(busy, 0.0 if compiled else work.launches * (ADAPTED if adapted else LAUNCH))


def optimizer_seconds(layout: Layout, weights: Weights, kind: GpuKind, *, average: bool) -> float:
    """AdamW's fused kernel reads weight, gradient and two moments and writes three of them: 28 bytes a number."""
    own = layout.part(weights.trained, layout.kind in ("fsdp", "deepspeed"))
    each = 28 + (12 if average else 0)
    if layout.offload_states:  # over PCIe and back: gradients down, weights up
        return own * 8 / 25e9 + own * each / 50e9
    return own * each / kind.copy


def ring(size: float, parts: int, bandwidth: float, hop: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of `size` bytes in a ring: ``(n - 1) / n S / B + (n - 1) a``."""
    return 0.0 if parts == 1 else (parts - 1) / parts * size / bandwidth + (parts - 1) * hop


def tree(size: float, parts: int, bandwidth: float, hop: float) -> float:
    """Seconds of an all-reduce in a double tree: ``2 S / B + 2 log2(n) a`` (NCCL 2.4's)."""
    return 0.0 if parts == 1 else 2 * size / bandwidth + 2 * math.ceil(math.log2(parts)) * hop


def all_reduce(size: float, layout: Layout, kind: GpuKind) -> float:
    """Seconds of an all-reduce over all devices: scattered in each node, reduced between them, gathered again."""
    near, far = kind.link * LINK, kind.network * LINK
    inside = 2 * ring(size, layout.devices, near, HOP_NEAR)
    share = size / layout.devices
    between = min(2 * ring(share, layout.nodes, far, HOP_FAR), tree(share, layout.nodes, far, HOP_FAR))
    return inside + between


def gather(size: float, layout: Layout, kind: GpuKind) -> float:
    """Seconds of an all-gather (or reduce-scatter) of `size` bytes over what holds the shards."""
    nodes = 1 if layout.hybrid else layout.nodes
    inside = ring(size, layout.devices, kind.link * LINK, HOP_NEAR)
    return inside + ring(size / layout.devices, nodes, kind.network * LINK, HOP_FAR)


def collective_seconds(layout: Layout, weights: Weights, gathered: int, blocks: int, kind: GpuKind) -> float:
    """Seconds that a step's collectives take by themselves, one micro-batch.

    Args:
        gathered: bytes of all weights as they are gathered.
        blocks: how many there are. Each counts as gathered for itself, so the latency of units is too high.
    """
    if layout.world == 1:
        return 0.0
    gradients = 4.0 * weights.trained
    if not layout.shards_weights:
        return all_reduce(gradients, layout, kind)
    once = blocks * gather(gathered / blocks, layout, kind)
    scattered = blocks * gather(gradients / blocks, layout, kind)
    copies = 0.0
    if layout.hybrid and layout.nodes > 1:
        share = gradients / layout.devices
        copies = min(
            2 * ring(share, layout.nodes, kind.network * LINK, HOP_FAR),
            tree(share, layout.nodes, kind.network * LINK, HOP_FAR),
        )
    return (1 if stays_gathered(layout, weights) else 2) * once + scattered + copies


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on every device.

    Args:
        compute: forward and backward passes.
        exposed: collectives that nothing hides, and what running beside them costs.
        optimizer: the update.
        waiting: for data.
    """

    compute: float
    exposed: float
    optimizer: float
    waiting: float

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.optimizer + self.waiting


def step_time(
    work: Work,
    layout: Layout,
    weights: Weights,
    kind: GpuKind,
    *,
    images: int,
    accumulate: int = 1,
    compiled: bool = False,
    adapted: bool = False,
    average: bool = False,
    gathered: int = 0,
    blocks: int = 1,
    cores: int | None = None,
) -> StepTime:
    """One optimizer step.

    Args:
        work: of one micro-batch on one device.
        images: a device's, in the whole step.
        accumulate: micro-batches of a step. Shards are gathered for each; replicas reduce once, at the end.
        compiled: whether blocks are compiled.
        adapted: whether there are adapters, whose layers take longer to launch.
        average: whether there is a moving average.
        gathered: bytes of all weights as they are gathered, where they are.
        blocks: of the model.
        cores: that load data, for each device; None: enough.
    """
    compute = accumulate * compute_seconds(work, kind, compiled=compiled, adapted=adapted)
    times = accumulate if layout.shards_weights else 1
    moved = times * collective_seconds(layout, weights, gathered, blocks, kind)
    hidden = OVERLAPPED * compute if times > 1 or accumulate == 1 else OVERLAPPED * compute / accumulate
    exposed = max(0.0, moved - hidden) + (CONTENTION * compute if layout.world > 1 else 0.0)
    optimizer = optimizer_seconds(layout, weights, kind, average=average)
    busy = compute + exposed + optimizer
    load = 0.0 if cores is None else images / (IMAGES_A_CORE * max(1, cores))
    return StepTime(compute, exposed, optimizer, max(0.0, load - busy))
