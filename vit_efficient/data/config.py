"""The data part of a protocol."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from vit_efficient.config import Config
from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.sources.config import SourceConfig

Decoder = Literal["fast", "exact", "device"]


class DataConfig(Config):
    source: SourceConfig = Field(description="What the shards were, or will be, made from.")
    shards: str | None = Field(
        None,
        description="Training shards: a folder with a `manifest.json`, the parent of `train/` and `val/` folders, "
        "or a brace pattern whose manifest lies beside the shards; a local path, `http(s)://`, `s3://`, or what else "
        "fsspec opens. Unset: only for `digits`, which is prepared on first use.",
    )
    eval_shards: str | None = Field(
        None, description="Evaluation shards, likewise. Unset: the `val` folder beside the training shards."
    )
    batch_size: PositiveInt = Field(
        description="Images of one optimizer step over all devices. Never changes on resume."
    )
    eval_batch_size: PositiveInt | None = Field(
        None, description="Images that one device evaluates at once. Unset: as many as it trains on at once."
    )
    workers: NonNegativeInt | None = Field(
        None,
        description="Loader processes per device. Unset: one less than the device's share of the cores, 8 at most.",
    )
    eval_resize: PositiveInt | None = Field(
        None,
        description="Shorter side, in pixels, that evaluation resizes to before the centre crop. "
        "Unset: from the crop ratio of the model's own timm config.",
    )
    decoder: Decoder = Field(
        "fast",
        description="`fast`: libjpeg-turbo decodes what the crop needs, torch resizes. `exact`: Pillow, pixel for "
        "pixel what most training code does. `device`: JPEGs are decoded and resized on the GPU, by nvJPEG.",
    )
    streams: PositiveInt = Field(
        64, description="Parts of the shuffled epoch that are read side by side; part of the order's definition."
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise",
        description="What a sample that is altered, cut off or undecodable does: stop the run, or be left out, counted "
        "and named.",
    )
    max_skipped: float = Field(
        0.01,
        ge=0,
        le=1,
        description="With `skip`: share of an epoch, or of an evaluation, that each device may leave out of its own "
        "part before the run stops; one sample at least, unless it is 0.",
    )
    remote: RemoteConfig = Field(RemoteConfig(), description="How shards at a URL are read.")
    audit: Path | None = Field(None, description="Append `epoch step rank key` to this file for every training sample.")


class AugmentConfig(Config):
    """Training transforms; each is off when zero. Evaluation has none of them."""

    crop_scale: tuple[float, float] = Field(
        (0.08, 1.0),
        description="Area of the random resized crop, as a share of the image. "
        "`[1, 1]` with `crop_ratio: [1, 1]` is the largest centred square.",
    )
    crop_ratio: tuple[float, float] = Field((0.75, 1.3333), description="Aspect ratio of the random resized crop.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    rand_augment: NonNegativeInt = Field(0, description="Number of RandAugment operations an image.")
    magnitude: int = Field(9, ge=0, le=30, description="RandAugment magnitude, out of 30.")
    erasing: float = Field(0.0, ge=0, le=1, description="Probability of random erasing.")
    mixup: float = Field(0.0, ge=0, description="Mixup's Beta parameter.")
    cutmix: float = Field(0.0, ge=0, description="CutMix's Beta parameter. With both, each step draws one of the two.")

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _range(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        low, high = value
        most = 1.0 if info.field_name == "crop_scale" else math.inf
        if not 0 < low <= high <= most:
            bound = " and at most 1" if most == 1 else ""
            raise ValueError(f"must be [smallest, largest], both above 0{bound}, got {list(value)}")
        return value
