"""What goes into a shard: the source's own bytes where they serve, a re-encoding where they do not.

What becomes of an image:

| image | in the shard |
|---|---|
| JPEG, PNG, WebP of 8 bits a channel | byte for byte, whatever its file was called |
| turned by its EXIF tag | turned, as JPEG or PNG without the tag: nothing downstream reads EXIF |
| CMYK JPEG, 16-bit PNG | RGB of 8 bits |
| GIF, BMP, TIFF, ... | PNG; of several frames the first |
| shorter side above `Recode.shortest_side` | resized, as JPEG |
| 1 x 1 pixel | as it is: it is an image |
| truncated, damaged, empty, no image, of over 179 million pixels | left out, with the reason |
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vit_efficient.data.decode import UndecodableImage, is_turned, open_image, to_rgb
from vit_efficient.data.jpeg import Frame, read_frame
from vit_efficient.data.sources.base import BadImage

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more of them behind it
_LOSSY = ("JPEG", "MPO", "WEBP")
_PLAIN_MODES = ("RGB", "L", "RGBA", "LA", "P", "1")
_CONVERTED = 95  # JPEG quality of what has to be converted
_HARMLESS = "extraneous bytes before marker"  # libjpeg skips them, and nothing is lost


@dataclass(frozen=True)
class Recode:
    """Make large images smaller.

    Args:
        shortest_side: in pixels; images above it are resized to it. None: none are.
        quality: of the JPEGs that they become, 1 to 100.
    """

    shortest_side: int | None = None
    quality: int = 92


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) to PNG; the same bytes every time."""
    return _encoded(Image.fromarray(pixels), "PNG")


def checked(data: bytes, recode: Recode | None = None) -> tuple[bytes, str]:
    """Make sure that an image decodes, and make of it what the module's table says.

    Returns:
        bytes, and the extension that tells their format.

    Raises:
        BadImage: it does not decode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd EXIF data and of large images
        try:
            return _checked(data, recode or Recode())
        except UndecodableImage as error:
            raise BadImage(str(error)) from error


def _checked(data: bytes, recode: Recode) -> tuple[bytes, str]:
    if not data:
        raise BadImage("empty")
    image = open_image(data)
    kind = image.format or ""
    turned = is_turned(image)
    large = recode.shortest_side is not None and min(image.size) > recode.shortest_side
    frame = read_frame(data)  # None of what is no JPEG, and of CMYK and the like, which are Pillow's to decode
    if frame is not None:
        _check_jpeg(data, frame)
    if kind in KEPT and not turned and not large and image.mode in _PLAIN_MODES:
        if frame is None:
            to_rgb(image)
        return data, KEPT[kind]
    rgb = to_rgb(image)
    if turned:
        rgb = ImageOps.exif_transpose(_with_exif(rgb, image))
    if large:
        assert recode.shortest_side is not None
        return _encoded(_resized(rgb, recode.shortest_side), "JPEG", quality=recode.quality), "jpg"
    if kind in _LOSSY:
        return _encoded(rgb, "JPEG", quality=_CONVERTED, subsampling=0), "jpg"
    return _encoded(rgb, "PNG"), "png"


def _check_jpeg(data: bytes, frame: Frame) -> None:
    """Pillow passes over damage that libjpeg only warns of, and fills it with grey: here it is an error.

    At an eighth, decoding still reads every byte, and does little else.
    """
    smallest = {"min_height": -(-frame.height // 8), "min_width": -(-frame.width // 8)}
    try:
        simplejpeg.decode_jpeg(data, **smallest)
    except ValueError as error:
        if _HARMLESS not in str(error):
            raise BadImage(str(error)) from error


def _resized(image: Image.Image, shortest_side: int) -> Image.Image:
    scale = shortest_side / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _with_exif(rgb: Image.Image, image: Image.Image) -> Image.Image:
    rgb.info["exif"] = image.getexif().tobytes()
    return rgb


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    image.info = {}  # no EXIF, profile or comment of the source
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
