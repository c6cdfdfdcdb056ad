"""From an encoded image to uint8 pixels of the model's size; everything random is keyed by one integer a sample.

Transforms take the encoded bytes, not pixels, so that a decoder may leave out what the crop does not need.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from vit_efficient.data.config import AugmentConfig, Decoder
from vit_efficient.data.deferred import Deferred, can_defer
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.jpeg import Box, reduction, snapped
from vit_efficient.data.picture import interpolation, open_picture
from vit_efficient.errors import DataError

_TRIES = 10
_ERASE_AREA, _ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)  # of Zhong et al. 2017, "Random erasing"; as in timm


@dataclass(frozen=True)
class Pixels:
    """uint8 image of shape (size, size, 3), or what a GPU makes it of, and the box to erase (empty: width 0)."""

    image: NDArray[np.uint8] | Deferred
    erase: Box = (0, 0, 0, 0)


class Transform(Protocol):
    """Encoded image and random key in, pixels out."""

    size: int
    erases: bool

    def __call__(self, data: bytes, key: int) -> Pixels: ...


class EvalTransform:
    """Resize the shorter side, crop the centre, as timm's evaluation does; with `exact`, pixel for pixel.

    Args:
        image: what the model expects.
        resize: shorter side in pixels; None: `floor(size / crop_pct)`.
        decoder: see `picture`; `device` leaves JPEGs to the GPU.
    """

    erases = False

    def __init__(self, image: ImageSpec, resize: int | None = None, decoder: Decoder = "fast") -> None:
        self.size, self.decoder = image.size, decoder
        self.resize = math.floor(image.size / image.crop_pct) if resize is None else resize
        self.interpolation = interpolation(image.interpolation)
        if self.resize < self.size:
            raise DataError(
                f"data.eval_resize={self.resize} is smaller than the model's image size, {self.size}: "
                "the crop would have black borders."
            )

    def __call__(self, data: bytes, key: int = 0) -> Pixels:
        picture = open_picture(data, self.interpolation, exact=self.decoder == "exact")
        width, height = picture.width, picture.height
        short = min(width, height)  # the longer side is rounded down, the margins to even, as torchvision does
        across, down = self.resize * width // short, self.resize * height // short
        left, top = round((across - self.size) / 2), round((down - self.size) / 2)
        whole = (0, 0, width, height)
        if self.decoder == "device" and can_defer(data):
            return Pixels(Deferred(data, whole, (across, down), (left, top), self.size, flip=False))
        # what is decoded keeps twice the resolution of the result, so that nobody's accuracy moves
        resized = picture.resized(whole, across, down, scale=reduction(whole, 2 * across, 2 * down))
        return Pixels(resized[top : top + self.size, left : left + self.size])


class TrainTransform:
    """Random resized crop, horizontal flip, RandAugment, and a box to erase.

    All is drawn from generators seeded with the sample's key; RandAugment draws from torch's global one, which is put
    back afterwards.

    Args:
        image: what the model expects.
        augment: how much of each.
        decoder: see `picture`; `device` leaves JPEGs to the GPU.
    """

    def __init__(self, image: ImageSpec, augment: AugmentConfig, decoder: Decoder = "fast") -> None:
        self.size, self.decoder = image.size, decoder
        self.augment = augment
        self.erases = augment.erasing > 0
        self.interpolation = interpolation(image.interpolation)
        self.rand_augment: v2.RandAugment | None = None
        if augment.rand_augment:
            self.rand_augment = v2.RandAugment(
                augment.rand_augment,
                augment.magnitude,
                num_magnitude_bins=31,
                interpolation=InterpolationMode.BILINEAR,
                fill=[round(255 * value) for value in image.mean],
            )

    def __call__(self, data: bytes, key: int) -> Pixels:
        picture = open_picture(data, self.interpolation, exact=self.decoder == "exact")
        rng = random.Random(key)
        crop = draw_crop(rng, picture.width, picture.height, self.augment.crop_scale, self.augment.crop_ratio)
        flip = rng.random() < self.augment.flip
        box = draw_erase(rng, self.size) if rng.random() < self.augment.erasing else (0, 0, 0, 0)
        scale = reduction(crop, self.size, self.size)
        crop = snapped(crop, scale)  # whatever the decoder, so that all of them crop the same
        if self.decoder == "device" and can_defer(data):
            return Pixels(Deferred(data, crop, (self.size, self.size), (0, 0), self.size, flip), box)
        image = picture.resized(crop, self.size, self.size, scale=scale)
        image = flipped(image) if flip else image
        if self.rand_augment is not None:
            with torch.random.fork_rng(devices=[]):
                # not torch.manual_seed: that would seed, or queue a seeding of, every GPU too
                torch.default_generator.manual_seed(key)
                image = np.asarray(self.rand_augment(Image.fromarray(image)))
        return Pixels(image, box)


def flipped(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) mirrored left to right; numpy's own copy of a mirrored view takes ten times as long."""
    return torch.from_numpy(np.require(image, requirements="W")).flip(1).numpy()


def draw_crop(
    rng: random.Random, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Area of a random resized crop (Szegedy et al. 2014).

    Ten tries at an area and an aspect ratio; if none fits, the largest centred crop whose ratio is allowed.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            x, y = int(rng.random() * (width - crop_width + 1)), int(rng.random() * (height - crop_height + 1))
            return x, y, crop_width, crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width = min(width, max(1, round(height * aspect)))
    crop_height = min(height, max(1, round(width / aspect)))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def draw_erase(rng: random.Random, size: int) -> Box:
    """A box to erase in a square image; empty if ten tries do not fit."""
    for _ in range(_TRIES):
        area = size * size * rng.uniform(*_ERASE_AREA)
        aspect = math.exp(rng.uniform(math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])))
        width, height = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < width < size and 0 < height < size:
            return int(rng.random() * (size - width + 1)), int(rng.random() * (size - height + 1)), width, height
    return 0, 0, 0, 0
