"""Every kind of bad or odd image, each handled on purpose."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vit_efficient.data.decode import decode
from vit_efficient.data.encode import Recode, checked, encode_png
from vit_efficient.data.sources.base import BadImage

RED = np.zeros((6, 4, 3), np.uint8)
RED[:2] = (255, 0, 0)  # the upper third


def picture(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (saved(picture(), "PNG"), "png"),
        (saved(picture(), "JPEG", quality=70), "jpg"),
        (saved(picture(), "JPEG", progressive=True), "jpg"),
        (saved(picture(), "WEBP"), "webp"),
        (saved(picture().convert("L"), "JPEG"), "jpg"),
        (saved(picture().convert("P"), "PNG"), "png"),
        (saved(picture().convert("RGBA"), "PNG"), "png"),
        (saved(picture(), "JPEG") + b"something behind the end", "jpg"),
        (saved(picture(), "JPEG")[:-2] + b"\0\1\2\xff\xd9", "jpg"),  # libjpeg: extraneous bytes
        (saved(picture(1, 1), "PNG"), "png"),
        (saved(picture(1, 1), "JPEG"), "jpg"),
        (saved(picture(), "PNG", save_all=True, append_images=[picture(), picture()]), "png"),
    ],
)
def test_what_serves_stays_byte_for_byte(data: bytes, extension: str) -> None:
    """Whatever the file was called: one of ImageNet's `.JPEG` is a PNG."""
    assert checked(data) == (data, extension)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_other_formats_become_png(kind: str) -> None:
    data, extension = checked(saved(Image.fromarray(RED), kind))
    assert extension == "png"
    assert np.array_equal(np.asarray(decode(data)), RED)


def test_of_several_frames_the_first_is_taken() -> None:
    frames = [Image.fromarray(RED), Image.fromarray(RED[::-1].copy())]
    data, _ = checked(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert np.array_equal(np.asarray(decode(data)), RED)


def test_cmyk_becomes_rgb() -> None:
    """22 of ImageNet's training images are such."""
    data, extension = checked(saved(Image.fromarray(RED).convert("CMYK"), "JPEG"))
    assert extension == "jpg"
    image = Image.open(io.BytesIO(data))
    assert image.mode == "RGB"
    assert abs(int(np.asarray(image)[0, 0, 0]) - 255) < 12


def test_16_bits_become_8() -> None:
    grey = RED[:, :, 0]
    data, extension = checked(saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"))
    assert extension == "png"
    assert np.array_equal(np.asarray(decode(data))[:, :, 1], grey)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_turned_photograph_is_put_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    data, extension = checked(saved(Image.fromarray(RED), kind, exif=exif))
    assert extension == ("jpg" if kind == "JPEG" else "png")
    image = Image.open(io.BytesIO(data))
    assert image.getexif().get(0x0112, 1) == 1
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (4, 6, 3)
    assert pixels[:, -1, 0].min() > 150  # the red edge is at the right now
    assert pixels[:, 0, 0].max() < 100


def test_a_phones_photograph_of_several_images_stays() -> None:
    data = saved(picture(), "MPO", save_all=True, append_images=[picture(32, 32)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert checked(data) == (data, "jpg")


def bomb() -> bytes:
    """A PNG that says 20,000 x 20,000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


JPEG, PNG = saved(picture(), "JPEG"), saved(picture(), "PNG")
HALF = len(JPEG) // 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>no such file</html>", "not an image"),
        (JPEG[:HALF], "Premature end"),
        (JPEG[:-2], "Premature end"),  # all pixels, and no end: perhaps a transfer that stopped
        (JPEG[:2], "not an image|truncated"),
        (JPEG[:HALF] + b"\xff\xd9", "Corrupt JPEG data: premature end"),  # Pillow would fill it with grey
        (JPEG[:HALF] + b"\xff" + JPEG[HALF:], "Corrupt JPEG data|Unsupported marker"),
        (saved(picture(), "JPEG", progressive=True)[:HALF], "Premature end"),
        (saved(picture().convert("CMYK"), "JPEG")[:HALF], "truncated"),
        (PNG[: len(PNG) // 2], "truncated|image file"),
        (PNG[:60] + b"\0\0\0\0" + PNG[64:], "."),
        (saved(picture(), "WEBP")[:100], "."),
        (bomb(), "pixels"),
    ],
)
def test_what_does_not_serve_is_left_out_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        checked(data)


def test_large_images_are_made_smaller() -> None:
    smooth = picture(8, 6).resize((800, 600), Image.Resampling.BICUBIC)
    for kind in ("JPEG", "PNG"):
        data, extension = checked(saved(smooth, kind), Recode(shortest_side=120, quality=90))
        made = decode(data)
        assert (extension, made.size) == ("jpg", (160, 120))
        exact = np.asarray(smooth.resize((160, 120), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(made) - exact).mean() < 3


def test_small_images_stay_as_they_are() -> None:
    for size in ((120, 500), (500, 120), (64, 48)):
        data = saved(picture(*size), "JPEG")
        assert checked(data, Recode(shortest_side=120)) == (data, "jpg")


def test_quality_decides_the_size() -> None:
    large = saved(picture(400, 300), "JPEG")
    sizes = [len(checked(large, Recode(shortest_side=100, quality=quality))[0]) for quality in (50, 92, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.6 * sizes[2]


def test_png_is_the_same_every_time() -> None:
    pixels = np.asarray(picture())
    assert encode_png(pixels) == encode_png(pixels.copy())
