"""Image bytes to RGB pixels."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

_BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # the EXIF tag
_Turn = Image.Transpose
_UPRIGHT = {
    2: _Turn.FLIP_LEFT_RIGHT, 3: _Turn.ROTATE_180, 4: _Turn.FLIP_TOP_BOTTOM, 5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270, 7: _Turn.TRANSVERSE, 8: _Turn.ROTATE_90,
}  # fmt: skip


class UndecodableImage(ValueError):  # noqa: N818 - named for the thing
    """Bytes that are not a whole image; the message says why."""


def open_image(data: bytes) -> Image.Image:
    """Read an image's header; its pixels are decoded when they are first used.

    Raises:
        UndecodableImage: not an image, or of a kind that is not known.
    """
    try:
        return Image.open(io.BytesIO(data))
    except _BROKEN as error:
        raise UndecodableImage(_reason(error)) from error


def turn_needed(image: Image.Image) -> Image.Transpose | None:
    """What puts an image upright, if its EXIF tag says that it lies otherwise.

    Raises:
        UndecodableImage: the data end early or are damaged (a PNG may have the tag behind its pixels).
    """
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except _BROKEN as error:
        raise UndecodableImage(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB: alpha is dropped, grey repeated, 16-bit grey scaled (`convert` alone would clip it).

    Raises:
        UndecodableImage: the data end early or are damaged.
    """
    try:
        image.load()
        if image.mode.startswith("I;16"):
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        return image if image.mode == "RGB" else image.convert("RGB")
    except _BROKEN as error:
        raise UndecodableImage(_reason(error)) from error


def decode(data: bytes) -> Image.Image:
    """RGB pixels of an encoded image.

    Raises:
        UndecodableImage: it is no whole image.
    """
    return to_rgb(open_image(data))


def _reason(error: Exception) -> str:
    return "not an image" if str(error).startswith("cannot identify") else str(error) or type(error).__name__
