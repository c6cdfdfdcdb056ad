"""JPEGs that a GPU will decode (`data.decoder: device`): what a worker sends in place of pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from vit_efficient.data.jpeg import Box, read_frame
from vit_efficient.errors import DataError


class Deferred(NamedTuple):
    """One JPEG, and what becomes of it.

    Args:
        data: the file.
        box: the part of it that is resized.
        resized: width and height after that.
        corner: x and y of the square that is kept of the result.
        size: side of the square.
        flip: whether it is mirrored.
    """

    data: bytes
    box: Box
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: int
    flip: bool


def can_defer(data: bytes) -> bool:
    """Whether these bytes are a JPEG that nvJPEG takes, and whole: what is missing it would fill with grey."""
    return data.endswith(b"\xff\xd9") and read_frame(data) is not None


class DeferredImages:
    """Those of one batch, and which of its rows they are. Neither tensor nor container, so nobody moves or pins it."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.items: list[Deferred] = []

    def add(self, row: int, item: Deferred) -> None:
        """Put an image into a row."""
        self.rows.append(row)
        self.items.append(item)


def decode_on_device(deferred: DeferredImages, device: torch.device, mode: str, keys: list[str]) -> Tensor:
    """Decode by nvJPEG (through torchvision), resize with antialiasing, crop, flip.

    Args:
        deferred: n images.
        device: a CUDA device.
        mode: `bilinear` or `bicubic`.
        keys: of the batch's samples, for messages.

    Returns:
        uint8 (n, 3, size, size) on the device.

    Raises:
        DataError: an image that nvJPEG cannot decode; the message names its sample.
    """
    files = [torch.frombuffer(bytearray(item.data), dtype=torch.uint8) for item in deferred.items]
    try:
        decoded = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        raise DataError(_which(files, deferred, device, keys, error)) from error
    return torch.stack([_finish(image, item, mode) for image, item in zip(decoded, deferred.items, strict=True)])


def _finish(image: Tensor, item: Deferred, mode: str) -> Tensor:
    x, y, across, down = item.box
    (width, height), (left, top) = item.resized, item.corner
    part = image[None, :, y : y + down, x : x + across].to(torch.float32)
    part = functional.interpolate(part, (height, width), mode=mode, antialias=True)[0]
    part = part[:, top : top + item.size, left : left + item.size].round().clamp(0, 255).to(torch.uint8)
    return part.flip(2) if item.flip else part


def _which(files: list[Tensor], deferred: DeferredImages, device: torch.device, keys: list[str], why: object) -> str:
    """The batch failed; find out whose fault it was."""
    for file, row in zip(files, deferred.rows, strict=True):
        try:
            decode_jpeg(file, mode=ImageReadMode.RGB, device=device)
        except RuntimeError as error:
            return (
                f"sample {keys[row]}: the image cannot be decoded on the GPU: {error}. "
                "Set data.decoder=fast, which decodes on the CPU and can leave such images out."
            )
    return f"nvJPEG failed on a batch, though not on any one of its images: {why}. Set data.decoder=fast."
