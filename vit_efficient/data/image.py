"""What a model expects of its input images."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpec:
    """The input side of a model's own timm config.

    Args:
        size: pixels a side of the square input.
        mean: per channel, in units of a [0, 1] image.
        std: per channel, likewise.
        interpolation: ``bicubic``, ``bilinear``, ``nearest`` or ``lanczos``.
        crop_pct: share of the resized shorter side that the evaluation crop keeps.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
