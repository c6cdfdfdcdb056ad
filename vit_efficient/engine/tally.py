"""What `verify` counts of each backend at each layer, the bounds, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

REFERENCE, ONNX, FUSED = "reference", "onnx", "fused"
SHARE, OFF_BY, OUTPUT = 0.9999, 1, 1e-5  # of backends that are not exact
GELU_SHARE = 0.999  # of codes that a fused product makes which ends in GELU
# Of e4m3 codes behind sums on fp8 units: neighbours lie 1/16 to 1/8 apart, so a relative error of the sums changes the
# codes of some thirty times that share; and near zero they lie so close that one change can be many steps.
FP8_CHANGED, FP8_OFF_BY = 30, 254
BF16_LOGITS = 1e-2
SHOWN = 8  # hexadecimal digits of a digest


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference, relative to that of the reference."""
    norm = float(reference.norm())
    return float((value - reference).norm()) / (norm or 1.0)


def worst(a: float, b: float) -> float:
    """The larger of two differences; NaN, which `max` may lose, is worse than any."""
    return a if a != a or b <= a else b


@dataclass
class Tally:
    """One backend at one layer, over all batches.

    Args:
        exact: whether every code must be equal; else nearly all, and none far off.
        bound: how far outputs may be from the definition's, of their norm; 0: not at all.
        least: the share of codes that must be equal where not all must be.
        off_by: how far a code may then be from the definition's.
    """

    exact: bool = True
    bound: float = 0.0
    least: float = SHARE
    off_by: int = OFF_BY

    codes: Any = field(default_factory=sha256)
    outputs: Any = field(default_factory=sha256)
    total: int = 0
    equal: int = 0
    largest: int = 0
    """Largest difference of a code from the definition's on the same input."""
    running: int = 0
    """Codes equal to those of the reference's own run, where inputs may differ already."""
    output: float = 0.0
    """Largest relative difference of a batch's outputs from the definition's on the same input."""
    identical: bool = True
    seen_outputs: bool = False

    def add(self, codes: Tensor, y: Tensor, defined_codes: Tensor, defined_y: Tensor, run_codes: Tensor) -> None:
        """Take in one batch."""
        self.add_codes(codes, defined_codes, run_codes)
        y, defined_y = y.to(torch.float32).cpu().contiguous(), defined_y.to(torch.float32).cpu()
        self.seen_outputs = True
        self.outputs.update(y.numpy().tobytes())
        self.identical = self.identical and torch.equal(y, defined_y)
        self.output = worst(self.output, relative(y, defined_y))

    def add_codes(self, codes: Tensor, defined_codes: Tensor, run_codes: Tensor) -> None:
        """Take in one batch of which no output is seen."""
        codes, defined_codes = codes.cpu().contiguous(), defined_codes.cpu()
        self.codes.update(codes.numpy().tobytes())
        off = (codes.to(torch.int16) - defined_codes.to(torch.int16)).abs()
        self.total += off.numel()
        self.equal += int((off == 0).sum())
        self.largest = max(self.largest, int(off.max()))
        self.running += int((codes == run_codes).sum())

    @property
    def share(self) -> float:
        """Of codes that equal the definition's."""
        return self.equal / max(1, self.total)

    def digests(self) -> str:
        """Of the codes and of the outputs, shortened."""
        outputs = self.outputs.hexdigest()[:SHOWN] if self.seen_outputs else "-" * SHOWN
        return f"{self.codes.hexdigest()[:SHOWN]} {outputs}"

    def breach(self) -> str | None:
        """What breaks the bounds, or None."""
        codes = f"{100 * self.share:.4f} % of the codes equal, largest difference {self.largest}"
        if self.exact and self.equal < self.total:
            return f"{codes}; it must be all"
        if self.share < self.least or self.largest > self.off_by:
            return f"{codes}; the bound is {100 * self.least:.2f} % and {self.off_by}"
        if not self.bound and not self.identical:
            return f"outputs differ by {self.output:.1e} of their norm; they must be equal"
        if self.bound and not self.output <= self.bound:
            return f"outputs differ by {self.output:.1e} of their norm; the bound is {self.bound:.0e}"
        return None


@dataclass
class VerifyResult:
    """What was compared and what came of it.

    Args:
        layers: by backend, then by layer in the order of the forward.
        absent: backends that could not run, and why.
        logits: by backend, the relative difference of the logits from the reference's run.
        top1: by backend, images whose highest logit is that of the reference's run, and images in all.
        given: relative difference of the fused model's logits from the definition's on the codes that entered each
            layer of it, and its bound; None: no block is fused.
        bf16: likewise under bf16 autocast, with the share of equal codes; `fp32` stands for the reference in fp32. Of
            `fused` against the reference in fp32, and reported only: it rounds to 16 bits in fewer places.
        rounded_sums: whether layers sum on fp8 units, in fewer bits than the reference. A code in 100 differs then,
            and logits under bf16 are held to what bf16 does to the reference itself where that is more than the bound.
        failures: (backend, layer or ``logits``, what is wrong), the first layer of the forward first.
    """

    layers: dict[str, dict[str, Tally]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    logits: dict[str, float] = field(default_factory=dict)
    top1: dict[str, tuple[int, int]] = field(default_factory=dict)
    given: tuple[float, float] | None = None
    bf16: dict[str, tuple[float, float]] = field(default_factory=dict)
    rounded_sums: bool = False
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def bf16_bound(self) -> float:
        """How far logits may be from the reference's under bf16, of their norm."""
        return max(BF16_LOGITS, self.bf16["fp32"][1]) if self.rounded_sums else BF16_LOGITS

    @property
    def ok(self) -> bool:
        """Whether every backend that ran keeps its bound."""
        return not self.failures


def judge(result: VerifyResult, exact: dict[str, bool]) -> None:
    """Fill in the failures.

    Args:
        result: counts of all backends.
        exact: by backend, whether its logits must equal the reference's bit for bit.
    """
    order = list(result.layers[REFERENCE])
    for layer in order:
        for name, tallies in result.layers.items():
            if name != REFERENCE and layer in tallies and (reason := tallies[layer].breach()):
                result.failures.append((name, layer, reason))
    for name, difference in result.logits.items():
        if exact[name] and difference != 0:
            result.failures.append((name, "logits", f"differ by {difference:.1e} of their norm; they must be equal"))
    if result.given is not None and not result.given[0] <= result.given[1]:
        reason = f"on the same codes differ by {result.given[0]:.1e} of their norm; the bound is {result.given[1]:.0e}"
        result.failures.append((FUSED, "logits", reason))
    for name, (_, difference) in result.bf16.items():
        if name not in ("fp32", FUSED) and not difference <= result.bf16_bound:
            reason = f"under bf16 differ by {difference:.1e} of their norm; the bound is {result.bf16_bound:.1e}"
            result.failures.append((name, "logits", reason))
