"""Figures from logits: how close two models are, and what one loses against the other on the same images.

Legend: B images, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vit_efficient.quantization.agreement import LogitComparison, compare, correct, require_finite

__all__ = ["LogitComparison", "PairedDrop", "compare", "paired_drop", "tango"]

Z95 = 1.959964  # two-sided 95 % of the normal distribution
_HALVINGS = 60  # of an interval of at most 2: beyond float64's last digit


@dataclass(frozen=True)
class PairedDrop:
    """What a model loses against its reference, both judged on the same images.

    Args:
        top1_reference: share of the images that the reference gets right, of 1.
        top1: the same of the model that is judged.
        drop: `top1_reference - top1`, in percentage points; negative where the judged model is better.
        low: lower end of the 95 % interval of the drop, in points.
        high: upper end.
        lost: images that the reference alone gets right.
        gained: images that the judged model alone gets right.
        n: number of images.
    """

    top1_reference: float
    top1: float
    drop: float
    low: float
    high: float
    lost: int
    gained: int
    n: int

    def __str__(self) -> str:
        return f"{self.drop:+.2f} points (95 %: {self.low:+.2f} to {self.high:+.2f}, n = {self.n:,})"


def paired_drop(labels_B: Tensor, reference_BC: Tensor, logits_BC: Tensor) -> PairedDrop:
    """The loss of top-1 accuracy and its 95 % interval.

    The two models see the same images, so only those count that one gets right and the other does not; the interval of
    unpaired shares would be several times as wide. It is Tango's (see `tango`). It holds for images drawn at random,
    and not for those that settings were chosen on.

    Args:
        labels_B: true classes, (B,).
        reference_BC: logits of the full-precision model, (B, C).
        logits_BC: logits of the model that is judged. An image for which they are not finite counts as wrong.

    Raises:
        ValueError: shapes that do not fit, or B is 0.
        UserError: the reference has NaN or infinite logits.
    """
    if reference_BC.ndim != 2 or reference_BC.shape != logits_BC.shape or labels_B.shape != reference_BC.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (labels_B, reference_BC, logits_BC))
        raise ValueError(f"labels are (B,) and both logits (B, C), got {shapes}")
    if len(labels_B) == 0:
        raise ValueError("no images to compare")
    require_finite(reference_BC)
    before, after = correct(labels_B, reference_BC).cpu(), correct(labels_B, logits_BC).cpu()
    n, lost, gained = len(labels_B), int((before & ~after).sum()), int((after & ~before).sum())
    low, high = tango(lost, gained, n)
    top1_reference, top1 = int(before.sum()) / n, int(after.sum()) / n
    return PairedDrop(top1_reference, top1, 100 * (lost - gained) / n, 100 * low, 100 * high, lost, gained, n)


def tango(lost: int, gained: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Tango's score interval for the difference of two paired proportions.

    T. Tango, "Equivalence test and confidence interval for the difference in proportions for the paired-sample design",
    Statistics in Medicine 17 (1998) 891-908. The interval holds every difference that the score test does not reject;
    at zero that is McNemar's test, so the interval leaves out 0 exactly where McNemar's test finds a difference.

    Args:
        lost: pairs of which only the first succeeded.
        gained: pairs of which only the second did.
        n: all pairs, at least 1.
        z: quantile of the normal distribution.

    Returns:
        The ends of the interval of (lost - gained) / n, within -1 to 1.
    """
    high = _end(lost, gained, n, z)
    return -_end(gained, lost, n, z), high


def _end(lost: int, gained: int, n: int, z: float) -> float:
    """The difference above (lost - gained) / n at which the score statistic, which falls with it, reaches -z."""
    low, high = (lost - gained) / n, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _score(lost, gained, n, middle) > -z:
            low = middle
        else:
            high = middle
    return high


def _score(lost: int, gained: int, n: int, difference: float) -> float:
    """Tango's equation for the score statistic, with the likeliest share of gained pairs under `difference`."""
    a, c = 2 * n, -gained * difference * (1 - difference)
    b = -lost - gained + (2 * n - lost + gained) * difference
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * share + difference * (1 - difference))
    distance = lost - gained - n * difference
    return (
        distance / math.sqrt(variance)
        if variance > 0
        else (0.0 if distance == 0 else math.copysign(math.inf, distance))
    )
