"""GPUs by name: what their makers promise and, of one, what was measured. Rates in operations or bytes a second."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vit_efficient.errors import UserError

T, G = 1e12, 1e9


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU and how it is linked to others.

    Args:
        name: as printed.
        capability: compute capability.
        memory: bytes.
        half: dense matrix products in bf16 or fp16, summed in float32.
        full: the same in float32, without TF32.
        int8: the same of 8-bit integers.
        attention: of the attention kernel, forward and backward, 197 tokens of 64.
        copy: bytes that a copy reads and writes.
        link: bytes to a neighbour in the node, one way.
        network: bytes to another node, one way, for each GPU.
        source: where the numbers are from.
        measured: whether the rates were measured; else they are the datasheet's, times the share that the H200 reached.
    """

    name: str
    capability: tuple[int, int]
    memory: float
    half: float
    full: float
    int8: float
    attention: float
    copy: float
    link: float
    network: float
    source: str
    measured: bool = False


# Peaks by datasheet, dense: bf16 989, int8 1,979, float32 67 TFLOP/s, 4.8 TB/s, NVLink 900 GB/s both ways.
# Rates measured at ViT-L's shapes (docs/scaling.md), which the share below puts in relation to the peaks.
H200 = GpuKind(
    "H200", (9, 0), 150.75 * G, 707 * T, 50.9 * T, 623 * T, 82 * T, 4.19 * T, 450 * G, 50 * G,
    "measured rates; links by datasheet (NVLink 4, InfiniBand NDR 400 Gb/s a GPU assumed)", measured=True,
)  # fmt: skip
REACHED = {"half": 707 / 989, "full": 50.9 / 67, "int8": 623 / 1979, "attention": 82 / 989, "copy": 4.19 / 4.8}


def _promised(
    name: str, capability: tuple[int, int], memory: float, half: float, int8: float, full: float, copy: float,
    link: float, network: float, source: str,
) -> GpuKind:  # fmt: skip
    """A datasheet's dense peaks (TFLOP/s, TOP/s, TB/s, GB/s) times the share that the H200 reaches of its own."""
    return GpuKind(
        name=name,
        capability=capability,
        memory=memory * G,
        half=half * T * REACHED["half"],
        full=full * T * REACHED["full"],
        int8=int8 * T * REACHED["int8"],
        attention=half * T * REACHED["attention"],
        copy=copy * T * REACHED["copy"],
        link=link * G,
        network=network * G,
        source=source,
    )


KINDS = {
    kind.name.lower(): kind
    for kind in (
        H200,
        _promised("H100", (9, 0), 85.5, 989, 1979, 67, 3.35, 450, 50, "NVIDIA H100 datasheet (SXM5); NDR assumed"),
        _promised("A100", (8, 0), 85.1, 312, 624, 19.5, 2.04, 300, 25, "NVIDIA A100 80GB datasheet; HDR assumed"),
        _promised("A100-40", (8, 0), 42.4, 312, 624, 19.5, 1.56, 300, 25, "NVIDIA A100 40GB datasheet; HDR assumed"),
        _promised("4090", (8, 9), 25.4, 165, 661, 82.6, 1.01, 25, 3, "NVIDIA Ada whitepaper; 25 Gb/s assumed"),
        _promised("T4", (7, 5), 15.8, 65, 130, 8.1, 0.32, 12, 3, "NVIDIA T4 datasheet; PCIe 3; 25 Gb/s assumed"),
    )
}


def gpu_kind(name: str) -> GpuKind:
    """A kind by its name.

    Raises:
        UserError: no such kind is known.
    """
    if name.lower() not in KINDS:
        raise UserError(f"--gpu {name}: not known. Known are {', '.join(KINDS)}.")
    return KINDS[name.lower()]


def kind_of(device: str) -> GpuKind | None:
    """The kind of a device by what CUDA calls it ("NVIDIA A100-SXM4-80GB") or a cluster ("rtx4090", "a100_80gb").

    None if it is another, or a slice of one (MIG), whose memory is not that of the whole.
    """
    words = re.split(r"[\s_:-]+", device.lower())
    if "mig" in words or any(re.fullmatch(r"\d+g\.\d+gb", word) for word in words):
        return None
    if "a100" in words:
        return KINDS["a100-40" if {"40", "40g", "40gb"} & set(words) else "a100"]
    return next((KINDS[word] for word in (w.removeprefix("rtx") for w in words) if word in KINDS), None)
