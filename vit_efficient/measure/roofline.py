"""What a chip allows at most, and a table of operations held against it.

A floor is the larger of operations over the matrix rate and bytes over the memory's, by the datasheet and by what a run
measured itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vit_efficient.kernels.timing import Timed

Kind = Literal["int8", "fp8", "half", "fp32"]
"""Of numbers that are multiplied; half: bfloat16 or float16."""

# Dense rates of the datasheets: operations a second of 8-bit matrix units, bytes a second of memory.
DATASHEET = {
    "NVIDIA H200": (1979e12, 4.8e12), "NVIDIA H100 80GB HBM3": (1979e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (624e12, 2.039e12), "NVIDIA GeForce RTX 4090": (660.6e12, 1.008e12),
}  # fmt: skip
# Of float32 outside the matrix units (no TF32).
FLOAT32 = {
    "NVIDIA H200": 67e12, "NVIDIA H100 80GB HBM3": 67e12, "NVIDIA A100-SXM4-80GB": 19.5e12,
    "NVIDIA GeForce RTX 4090": 82.6e12,
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    operations: float
    bytes: float

    def floor(self, operations: float, moved: float) -> float:
        """Milliseconds that nothing can be faster than."""
        return 1e3 * max(operations / self.operations, moved / self.bytes)


def datasheet(chip: str) -> dict[str, Rates] | None:
    """A chip's rates by kind of number; None of one that is not listed."""
    if chip not in DATASHEET:
        return None
    rate, memory = DATASHEET[chip]
    rates: dict[Kind, float] = {"int8": rate, "fp8": rate, "half": rate / 2, "fp32": FLOAT32[chip]}
    return {kind: Rates(one, memory) for kind, one in rates.items()}


@dataclass(frozen=True)
class Line:
    """One operation at one shape.

    Args:
        what: the layer, or other group that it is of.
        variant: who does it, in which form.
        shape: in words.
        kind: of the numbers that it multiplies.
        operations: additions and multiplications.
        bytes: that have to be moved.
        time: what it took.
    """

    what: str
    variant: str
    shape: str
    kind: Kind
    operations: float
    bytes: float
    time: Timed


HEAD = (
    f"{'what':5} {'variant':34} {'shape':18} {'ms':>9} {'spread':>8} {'T/s':>7} {'TB/s':>6} "
    f"{'floor':>8} {'by sheet':>8} {'of floor':>8}"
)


def render(line: Line, sheet: dict[str, Rates] | None, measured: dict[str, Rates]) -> str:
    """A row of the table under `HEAD`; without a floor where this chip cannot do that kind of product."""
    floors = [rates[line.kind].floor(line.operations, line.bytes) if rates and line.kind in rates else None
              for rates in (measured, sheet)]  # fmt: skip
    floor, by_sheet = (f"{'' if value is None else format(value, '.4f'):>8}" for value in floors)
    share = "" if floors[0] is None else f"{100 * floors[0] / line.time.median:7.1f}%"
    time = line.time
    return (
        f"{line.what:5} {line.variant:34} {line.shape:18} {time.median:9.4f} {time.high - time.low:8.4f} "
        f"{line.operations / time.median / 1e9:7.1f} {line.bytes / time.median / 1e9:6.2f} {floor} {by_sheet} {share}"
    )
