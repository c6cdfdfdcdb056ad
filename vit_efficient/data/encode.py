"""What goes into a shard: the source's own bytes where they serve, a re-encoding where they do not."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vit_efficient.data.decode import UndecodableImage, open_image, to_rgb
from vit_efficient.data.sources.base import BadImage

KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_PLAIN_MODES = ("RGB", "L", "RGBA", "LA", "P", "1")
_ORIENTATION = 0x0112  # the EXIF tag


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) to PNG; the same bytes every time."""
    return _encoded(Image.fromarray(pixels), "PNG")


def checked(data: bytes) -> tuple[bytes, str]:
    """Make sure that an image decodes, and can be decoded as it is.

    JPEG, PNG and WebP stay byte for byte, unless EXIF turns them (nothing downstream reads EXIF) or they are not of a
    plain 8-bit kind (CMYK, 16 bits). Those, and all other formats, are converted: lossy ones to JPEG of quality 95,
    the rest to PNG.

    Returns:
        bytes, and the extension that tells their format.

    Raises:
        BadImage: it does not decode.
    """
    try:
        image = open_image(data)
        kind = image.format or ""
        turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
        if kind in KEPT and not turned and image.mode in _PLAIN_MODES:
            if kind == "JPEG":
                # at an eighth, decoding still reads every byte, and does little else
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            to_rgb(image)
            return data, KEPT[kind]
        rgb = to_rgb(image)
        if turned:
            rgb = ImageOps.exif_transpose(_with_exif(rgb, image))
        if kind in ("JPEG", "WEBP"):
            return _encoded(rgb, "JPEG", quality=95, subsampling=0), "jpg"
        return _encoded(rgb, "PNG"), "png"
    except UndecodableImage as error:
        raise BadImage(str(error)) from error


def _with_exif(rgb: Image.Image, image: Image.Image) -> Image.Image:
    rgb.info["exif"] = image.getexif().tobytes()
    return rgb


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    image.info = {}  # no EXIF, profile or comment of the source
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
