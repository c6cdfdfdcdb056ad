from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from vit_efficient.data.jpeg import Frame, decode_crop, read_frame, reduction, snapped

KINDS = {"444": 0, "422": 1, "420": 2}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Coarse noise, so that chroma matters and JPEG keeps it."""
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def full(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("sampling", KINDS)
@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_is_the_full_decodes_to_the_last_bit(sampling: str, restarts: int, mode: str) -> None:
    data = encoded(picture(151, 133, mode), subsampling=KINDS[sampling], restart_marker_blocks=restarts)
    whole, frame = full(data), read_frame(data)
    assert frame is not None
    assert (frame.width, frame.height) == (151, 133)
    assert frame.height_at is not None
    rng = np.random.default_rng(0)
    for bottom in (*range(1, 40), 117, 132, 133):  # every place in a block, and the edge
        x, y = int(rng.integers(0, 150)), int(rng.integers(0, bottom))
        box = (x, y, int(rng.integers(1, 152 - x)), bottom - y)
        crop = decode_crop(data, frame, box)
        assert crop is not None
        assert np.array_equal(crop, whole[y:bottom, x : x + box[2]]), box


def test_rows_below_are_really_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(151, 600))
    frame = read_frame(data)
    assert frame is not None
    rows = []
    decode = simplejpeg.decode_jpeg

    def watch(data: bytes, **options: object) -> object:
        rows.append(simplejpeg.decode_jpeg_header(data, strict=False)[0])
        return decode(data, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", watch)
    decode_crop(data, frame, (0, 10, 151, 90))
    decode_crop(data, frame, (0, 10, 151, 590))
    assert rows == [104, 600]


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_reduced_decoding_is_close_to_averaging(scale: int) -> None:
    smooth = picture(24, 20).resize((480, 400), Image.Resampling.BICUBIC)
    data = encoded(smooth, subsampling=2)
    frame = read_frame(data)
    assert frame is not None
    box = snapped((37, 21, 301, 203), scale)
    crop = decode_crop(data, frame, box, scale)
    assert crop is not None
    x, y, width, height = box
    assert crop.shape == (height // scale, width // scale, 3)
    expected = full(data)[y : y + height, x : x + width].astype(float)
    expected = expected.reshape(height // scale, scale, width // scale, scale, 3).mean((1, 3))
    assert np.abs(crop - expected).mean() < 1


def test_a_whole_image_of_odd_size_is_reduced_to_its_edges() -> None:
    data = encoded(picture(101, 67))
    frame = read_frame(data)
    assert frame is not None
    crop = decode_crop(data, frame, (0, 0, 101, 67), 2)
    assert crop is not None
    assert crop.shape == (34, 51, 3)


def test_reduction_leaves_what_is_asked_for() -> None:
    assert reduction((0, 0, 447, 900), 224, 224) == 1
    assert reduction((0, 0, 448, 448), 224, 224) == 2
    assert reduction((9, 9, 2000, 1800), 224, 224) == 8
    assert reduction((0, 0, 2000, 1800), 448, 448) == 4
    assert reduction((0, 0, 40, 40), 2, 2) == 4  # never under a block of 8


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (7, 7), (9, 8)])
def test_tiny_images(size: tuple[int, int]) -> None:
    data = encoded(picture(*size))
    frame = read_frame(data)
    assert frame is not None
    assert np.array_equal(decode_crop(data, frame, (0, 0, *size)), full(data))


def test_progressive_has_no_rows_to_leave_out() -> None:
    data = encoded(picture(80, 90), progressive=True)
    frame = read_frame(data)
    assert frame is not None
    assert frame.height_at is None
    assert np.array_equal(decode_crop(data, frame, (8, 8, 40, 30)), full(data)[8:38, 8:48])


def test_what_it_does_not_take_is_left_to_others() -> None:
    png = io.BytesIO()
    picture(8, 8).save(png, "PNG")
    good = encoded(picture(40, 40))
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff", png.getvalue(), encoded(picture(8, 8, "CMYK")), good[:100]):
        assert read_frame(data) is None
    start = good.index(b"\xff\xc0")
    for end in range(start, start + 25):
        assert read_frame(good[:end]) is None  # never an IndexError


@pytest.mark.parametrize("keep", [0.3, 0.8])
def test_a_truncated_file_is_refused_wherever_the_crop_lies(keep: float) -> None:
    data = encoded(picture(151, 300))
    frame = read_frame(data)
    cut = data[: int(keep * len(data))]
    assert isinstance(frame, Frame)
    assert decode_crop(cut, frame, (0, 0, 151, 20)) is None
    assert decode_crop(cut, frame, (0, 0, 151, 300)) is None
