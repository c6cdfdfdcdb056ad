"""From the magnitudes of activations to the range that static quantization covers.

All observers see the same weighted histogram, so a token that matters more counts more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.errors import UserError
from vit_efficient.quantization.calibration import CalibrationConfig

BINS = 4096
CANDIDATES = 64
WEIGHT_UNIT = 2.0**16
# Below this part of the largest magnitude no range is tried.
NARROWEST = 1 / 32


def largest_magnitude(x: Tensor) -> float:
    """Of activations that can be calibrated on.

    Raises:
        UserError: x is empty, or holds a NaN or an infinity.
    """
    if not x.numel():
        raise UserError("Nothing to calibrate on: a layer saw no activations.")
    largest = float(x.abs().max())
    if not largest < float("inf"):
        raise UserError(
            "A layer's activations hold a NaN or an infinity on the calibration images. "
            "Check `model.weights` and the images; fp16 may overflow where quantization.precision=fp32 does not."
        )
    return largest


def histogram(x: Tensor, weight_T: Tensor | None = None) -> tuple[Tensor, float]:
    """Histogram of |x| and the largest magnitude.

    Args:
        x: (T, K), finite.
        weight_T: how much each row counts; None: all alike.

    Returns:
        counts (`BINS`,) float64 over equal bins from 0 to the largest magnitude, and that magnitude.

    Raises:
        UserError: as `largest_magnitude`.
    """
    largest = largest_magnitude(x)
    magnitude = x.abs()
    if largest == 0:
        counts = torch.zeros(BINS, dtype=torch.float64)
        counts[0] = x.numel()
        return counts, 0.0
    places = (magnitude / largest * BINS).to(torch.int32).clamp_max_(BINS - 1).flatten()
    if weight_T is None:
        return torch.bincount(places, minlength=BINS).double().cpu(), largest
    # As whole numbers, whose sums are exact in any order: a GPU adds in another one every time.
    whole_T = (weight_T * WEIGHT_UNIT).round().double()
    counts = torch.bincount(places, whole_T.unsqueeze(1).expand_as(x).reshape(-1), minlength=BINS)
    return counts.double().cpu() / WEIGHT_UNIT, largest


def threshold(x: Tensor, largest_code: int, config: CalibrationConfig, weight_T: Tensor | None = None) -> float:
    """The magnitude that gets the largest code; 0 if x is zero throughout.

    Args:
        x: (T, K) activations.
        largest_code: 127 of 8 bits, 7 of 4.
        config: which observer.
        weight_T: how much each row counts.

    Raises:
        UserError: as `largest_magnitude`.
    """
    counts, largest = histogram(x, weight_T)
    if largest == 0 or config.observer == "minmax":
        return largest
    if config.observer == "percentile":
        share = counts.cumsum(0) / counts.sum()
        return largest * min(int((share < config.percentile / 100).sum()) + 1, BINS) / BINS
    if config.observer == "mse":
        return _least_squares(counts, largest, largest_code)
    return _least_divergence(counts, largest, largest_code)


def _least_squares(counts: Tensor, largest: float, largest_code: int) -> float:
    """The range with the least squared error of rounding and saturation together."""
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (largest / BINS)
    ranges = largest * torch.linspace(NARROWEST, 1, CANDIDATES, dtype=torch.float64)
    steps = ranges.unsqueeze(1) / largest_code
    rounded = (centres / steps).round().clamp_max(largest_code) * steps
    return float(ranges[((rounded - centres).square() @ counts).argmin()])


def _least_divergence(counts: Tensor, largest: float, largest_code: int) -> float:
    """The range whose quantized distribution diverges least from the clipped one (Migacz, "8-bit inference with
    TensorRT", GTC 2017): saturated magnitudes are counted at the range's end, and each code spreads its count over the
    bins that it stands for, those that are empty excepted."""
    best, found = float("inf"), largest
    for part in torch.linspace(NARROWEST, 1, CANDIDATES).tolist():
        width = max(largest_code + 1, round(part * BINS))
        clipped = counts[:width].clone()
        clipped[-1] += counts[width:].sum()
        filled = counts[:width] > 0
        code = (torch.arange(width) * (largest_code + 1)) // width
        total = torch.zeros(largest_code + 1, dtype=torch.float64).index_add_(0, code, counts[:width])
        spread = torch.zeros(largest_code + 1, dtype=torch.float64).index_add_(0, code, filled.double())
        quantized = torch.where(filled, (total / spread.clamp_min(1))[code], 0)
        p, q = clipped / clipped.sum(), quantized / quantized.sum().clamp_min(1e-300)
        # Where the last bin was empty, all that saturates falls on nothing: an infinite divergence, kept finite.
        terms = torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-12)).log(), 0)
        if float(terms.sum()) < best:
            best, found = float(terms.sum()), largest * width / BINS
    return found
