"""What calibration on images may decide: the `calibration` section of the schemes that have it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from vit_efficient.config import Config

Observer = Literal["minmax", "percentile", "mse", "entropy"]
Rounding = Literal["nearest", "mse", "gptq"]


class CalibrationConfig(Config):
    """How ranges, and the rounding of weights, are found on images. Nothing here is trained."""

    samples: PositiveInt = Field(
        256, description="Training images, seen as in evaluation. Fewer where there are fewer; at least 16."
    )
    views: PositiveInt = Field(
        1, description="Views of each image: itself, and random crops of it, mirrored half the time."
    )
    observer: Observer = Field(
        "percentile",
        description="Range of static activations: the largest magnitude, a percentile of magnitudes, the least squared "
        "error, or the least divergence of the distribution (entropy, as TensorRT does).",
    )
    percentile: float = Field(99.99, gt=50, le=100, description="For `observer: percentile`.")
    smooth: float | Literal["auto"] | None = Field(
        "auto",
        description="Divide each input channel by amax(x)^a / amax(w)^(1-a) and multiply the weights by it "
        "(SmoothQuant); where activations are not quantized, by mean(|x|)^a (AWQ). The exponent a, or `auto` (the one "
        "with the least output error, for each layer), or nothing.",
    )
    shift: bool = Field(
        True,
        description="Static activations: subtract the middle of each channel's range, and add what that takes away to "
        "the bias (Outlier Suppression+). Of fp8: subtract each channel's mean, and of dynamic activations only.",
    )
    rounding: Rounding = Field(
        "gptq",
        description="Of weights: to nearest; to nearest in the range with the least squared error; or GPTQ, which "
        "makes later inputs' weights compensate for the error of earlier ones.",
    )
    bias_correction: bool = Field(True, description="Add to the bias what quantization changes in the mean output.")
    importance: bool = Field(
        True,
        description="Count each token's error by how much it matters to the logits (Fisher information), and not all "
        "alike.",
    )

    @field_validator("smooth")
    @classmethod
    def _exponent(cls, smooth: float | str | None) -> float | str | None:
        if isinstance(smooth, (int, float)) and not 0 <= smooth <= 1:
            raise ValueError(f"is an exponent from 0 to 1, `auto` or null, and not {smooth:g}")
        return smooth
