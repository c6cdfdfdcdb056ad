"""An encoded image, opened: its size is known, and it can be had resized, whole or a part of it.

The default is fast: libjpeg-turbo decodes no more than the part needs, and torch's vectorised kernel resizes. `exact`
is Pillow throughout, as most training code has it. They differ by rounding (below 0.1 of 255 on average), and
where a JPEG is decoded at reduced resolution by a little more.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from torchvision.transforms import InterpolationMode

from vit_efficient.data.decode import open_image, to_rgb
from vit_efficient.data.jpeg import Box, Frame, decode_crop, read_frame
from vit_efficient.errors import DataError

Pixels = NDArray[np.uint8]  # (height, width, 3)
_IN_TORCH = ("bilinear", "bicubic")


class Picture(Protocol):
    """An image whose pixels are yet to be decoded."""

    width: int
    height: int

    def resized(self, box: Box, width: int, height: int, *, scale: int = 1) -> Pixels:
        """What lies in the box, as uint8 (height, width, 3), antialiased.

        Args:
            box: in pixels of the image.
            width: of the result.
            height: of the result.
            scale: 1, 2, 4 or 8: how much of the resolution a decoder may leave out.

        Raises:
            UndecodableImage: the data end early or are damaged.
        """


def open_picture(data: bytes, mode: InterpolationMode, *, exact: bool = False) -> Picture:
    """Read an image's headers.

    Args:
        data: a whole JPEG, PNG, WebP, ...
        mode: how it will be resized.
        exact: by Pillow throughout; what torch does not resize by (`lanczos`, ...) is Pillow's in any case.

    Raises:
        UndecodableImage: not an image.
    """
    if exact or mode.value not in _IN_TORCH:
        return ExactPicture(data, Image.Resampling[mode.name])
    frame = read_frame(data)
    return FastPicture(data, frame, mode.value) if frame is not None else PlainPicture(data, mode.value)


class ExactPicture:
    """Decoded and resized by Pillow."""

    def __init__(self, data: bytes, resample: Image.Resampling) -> None:
        self._image, self._resample = open_image(data), resample
        self.width, self.height = self._image.size

    def resized(self, box: Box, width: int, height: int, *, scale: int = 1) -> Pixels:
        x, y, across, down = box
        image = to_rgb(self._image)
        if box != (0, 0, *image.size):
            image = image.crop((x, y, x + across, y + down))
        return np.asarray(image.resize((width, height), self._resample))


class PlainPicture:
    """Decoded by Pillow, resized by torch: PNG, WebP and unusual JPEGs."""

    def __init__(self, data: bytes, mode: str) -> None:
        self._image, self._mode = open_image(data), mode
        self.width, self.height = self._image.size

    def resized(self, box: Box, width: int, height: int, *, scale: int = 1) -> Pixels:
        x, y, across, down = box
        return resize(np.asarray(to_rgb(self._image))[y : y + down, x : x + across], width, height, self._mode)


class FastPicture:
    """A JPEG, decoded as far as needed by libjpeg-turbo, resized by torch."""

    def __init__(self, data: bytes, frame: Frame, mode: str) -> None:
        self._data, self._frame, self._mode = data, frame, mode
        self.width, self.height = frame.width, frame.height

    def resized(self, box: Box, width: int, height: int, *, scale: int = 1) -> Pixels:
        pixels = decode_crop(self._data, self._frame, box, scale)
        if pixels is None:
            return PlainPicture(self._data, self._mode).resized(box, width, height)
        return resize(pixels, width, height, self._mode)


def resize(pixels: Pixels, width: int, height: int, mode: str) -> Pixels:
    """Resize uint8 (h, w, 3) with antialiasing, as Pillow does but for rounding.

    Args:
        mode: `bilinear` or `bicubic`.
    """
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels)
    # contiguous, and so laid out for torch's vectorised channels-last kernel
    given = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
    made = functional.interpolate(given, (height, width), mode=mode, antialias=True)
    return made[0].permute(1, 2, 0).contiguous().numpy()


def interpolation(name: str) -> InterpolationMode:
    """torchvision's name for `bicubic`, `bilinear`, ...

    Raises:
        DataError: there is no such interpolation.
    """
    known = {mode.value: mode for mode in InterpolationMode}
    if name not in known:
        raise DataError(f"The model asks for interpolation {name!r}; known are {', '.join(known)}.")
    return known[name]
