"""What goes into a shard: the source's own bytes where they serve, a re-encoding where they do not.

What becomes of an image:

| image | in the shard |
|---|---|
| JPEG, PNG, WebP of 8 bits a channel | byte for byte, whatever its file was called |
| with bytes left over behind the last block or the end marker | the same: nothing of the image is missing |
| turned by its EXIF tag | turned, as JPEG or PNG without the tag: nothing downstream reads EXIF |
| CMYK JPEG, grey PNG of 16 bits | RGB of 8 bits |
| GIF, BMP, TIFF, ... | PNG; of several frames the first |
| shorter side above `Recode.shortest_side` | resized, as JPEG |
| 1 x 1 pixel | as it is: it is an image |
| truncated, damaged, empty, no image, of over 179 million pixels | left out, with the reason |

Damage is what a decoder can see. A flipped bit that happens to make another valid code of a JPEG is not seen by anyone.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from vit_efficient.data.decode import UndecodableImage, open_image, to_rgb, turn_needed
from vit_efficient.data.sources.base import BadImage

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more of them behind it
_JPEGS = ("JPEG", "MPO")
_LOSSY = (*_JPEGS, "WEBP")
_PLAIN_MODES = ("RGB", "L", "RGBA", "LA", "P", "1")
_CONVERTED = 95  # JPEG quality of what has to be converted
_DAMAGE = re.compile("Corrupt JPEG data|Premature end|Inconsistent progression")  # libjpeg's warnings
_HARMLESS = re.compile("extraneous bytes before marker 0xd9|bad ICC")  # 0xd9 ends the image, so no block is missing


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
    turn = turn_needed(image)
    smaller = _smaller(image.size, recode.shortest_side)
    seen = kind in _JPEGS and _check_jpeg(data, image)
    if kind in KEPT and turn is None and smaller is None and image.mode in _PLAIN_MODES:
        if not seen:
            to_rgb(image)
        return data, KEPT[kind]
    if smaller is not None:
        # at a half, a quarter or an eighth, where twice the size is left: a JPEG's own way to average pixels
        image.draft(None, (2 * smaller[0], 2 * smaller[1]))
    rgb = to_rgb(image)
    if smaller is not None:
        rgb = rgb.resize(smaller, Image.Resampling.LANCZOS)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if smaller is not None:
        return _encoded(rgb, "JPEG", quality=recode.quality), "jpg"
    if kind in _LOSSY:
        return _encoded(rgb, "JPEG", quality=_CONVERTED, subsampling=0), "jpg"
    return _encoded(rgb, "PNG"), "png"


def _check_jpeg(data: bytes, image: Image.Image) -> bool:
    """Pillow passes over damage that libjpeg only warns of, and fills it with grey: here it is an error.

    At an eighth, decoding still reads every byte, and does little else.

    Returns:
        whether all is well; if not, it is Pillow's to say (libjpeg tells no more than the first thing that it notices,
        and TurboJPEG takes fewer kinds of JPEG).
    """
    width, height = image.size
    try:
        simplejpeg.decode_jpeg(data, min_height=-(-height // 8), min_width=-(-width // 8))
    except ValueError as error:
        if _DAMAGE.search(str(error)) and not _HARMLESS.search(str(error)):
            raise BadImage(str(error)) from error
        return False
    return True


def _smaller(size: tuple[int, int], shortest_side: int | None) -> tuple[int, int] | None:
    """What it is resized to, if it is."""
    if shortest_side is None or min(size) <= shortest_side:
        return None
    scale = shortest_side / min(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    image.info = {}  # no EXIF, profile or comment of the source
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
