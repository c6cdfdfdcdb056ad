"""JPEG bytes to the pixels that a crop needs, through libjpeg-turbo (simplejpeg).

Two things are left out, which a full decode would do: rows below the crop, and resolution that the resize would throw
away again (the inverse DCT at a half, a quarter or an eighth). Entropy decoding, most of the work, has to be done from
the top down to the crop's last row in any case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Box = tuple[int, int, int, int]  # x0, y0, width, height

_SEQUENTIAL = (0xC0, 0xC1)  # start of frame: baseline, extended sequential
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _END = 0xDA, 0xD9
_SCALES = (8, 4, 2)  # the ones that libjpeg-turbo has fast code for
_LEFT_OVER = "extraneous bytes before marker"


@dataclass(frozen=True)
class Frame:
    """What a JPEG's headers say.

    Args:
        width: in pixels.
        height: in pixels.
        components: 1 grey, 3 colour, 4 CMYK.
        sampling: rows of pixels to one row of the coarsest component.
        height_at: where the height stands in the file, if rows below a crop can be left out: all components lie in one
            scan, coded from top to bottom. Otherwise (progressive) None.
    """

    width: int
    height: int
    components: int
    sampling: int
    height_at: int | None


def read_frame(data: bytes) -> Frame | None:
    """Read the headers; None for what is not a JPEG, or not one that `decode_crop` takes (CMYK, lossless ...)."""
    if data[:2] != b"\xff\xd8":
        return None
    at, frame = 2, None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding between segments
            at += 1
            continue
        if marker == _END:
            return None
        if marker in _FRAMES:
            frame = _frame(data, at)
        if marker == _SCAN:
            if frame is None or frame.components not in (1, 3) or not (frame.width and frame.height):
                return None
            in_one_scan = data[at + 4 : at + 5] == bytes([frame.components])
            return frame if in_one_scan else Frame(frame.width, frame.height, frame.components, frame.sampling, None)
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _frame(data: bytes, at: int) -> Frame | None:
    if at + 10 > len(data):
        return None
    precision, components = data[at + 4], data[at + 9]
    if precision != 8 or at + 10 + 3 * components > len(data):
        return None
    height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
    sampling = max((data[at + 11 + 3 * number] & 15 for number in range(components)), default=1)
    return Frame(width, height, components, sampling, at + 5 if data[at + 1] in _SEQUENTIAL else None)


def reduction(box: Box, width: int, height: int) -> int:
    """The largest of 8, 4, 2 and 1 at which a box still has `width` x `height` pixels (and a block of 8 at least)."""
    _, _, across, down = box
    fits = (scale for scale in _SCALES if across >= scale * max(width, 8) and down >= scale * max(height, 8))
    return next(fits, 1)


def snapped(box: Box, scale: int) -> Box:
    """The box with its edges moved to multiples of `scale`; it stays inside the image."""
    x, y, width, height = (side // scale * scale for side in box)
    return x, y, width, height


def decode_crop(data: bytes, frame: Frame, box: Box, scale: int = 1) -> NDArray[np.uint8] | None:
    """Decode the part of a JPEG that lies in a box.

    Args:
        data: the whole file.
        frame: its headers.
        box: in pixels of the full image. Its edges are moved outwards to multiples of `scale`.
        scale: 1, 2, 4 or 8: how many pixels of the full image make one of the result, along each side.

    Returns:
        uint8 (height / scale, width / scale, 3); None if libjpeg-turbo finds fault with the file (a decoder that is
        more lenient, or gives better reasons, should have it then).
    """
    x, y, width, height = box
    rows = frame.height
    if frame.height_at is not None:
        # the rows of colour next to the last one are blended into it, so keep two of them
        rows = min(rows, y + height + 2 * scale * frame.sampling)
    shorter = bytearray(data)
    if rows < frame.height:
        assert frame.height_at is not None
        shorter[frame.height_at : frame.height_at + 2] = rows.to_bytes(2, "big")
    shape = (-(-rows // scale), -(-frame.width // scale), 3)
    pixels = np.empty(shape, np.uint8)
    smallest = {"min_height": shape[0], "min_width": shape[1]} if scale > 1 else {}
    try:
        simplejpeg.decode_jpeg(shorter, buffer=pixels, **smallest)
    except ValueError as error:
        # what is below the last row is, of course, left over; the pixels are there all the same
        if rows == frame.height or _LEFT_OVER not in str(error):
            return None
    return pixels[y // scale : -(-(y + height) // scale), x // scale : -(-(x + width) // scale)]
