from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode

from vit_efficient.data.config import AugmentConfig
from vit_efficient.data.decode import UndecodableImage
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.picture import FastPicture, PlainPicture, open_picture
from vit_efficient.data.transforms import EvalTransform, TrainTransform

MODES = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


def smooth(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (max(2, height // 20), max(2, width // 20), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photographs(shared: Callable[[str], Path]) -> list[bytes]:
    """60 real ImageNet images, of many sizes."""
    images = []
    with tarfile.open(shared("data/ILSVRC2012_sample_train.tar")) as outer:
        for number, member in enumerate(outer):
            if number % 17 == 0:
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    file = inner.extractfile(inner.next())  # type: ignore[arg-type]
                    assert file is not None
                    images.append(file.read())
    return images


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(600, 450), (1900, 1300), (90, 120)])
def test_smooth_crops_have_the_pixels_of_the_full_decode(mode: InterpolationMode, kind: str, size: tuple) -> None:
    """Mean absolute difference under 2 of 255, reduced decoding included; without it, rounding only."""
    data = saved(smooth(*size), kind)
    box = tuple(side // 8 * 8 for side in (size[0] // 9, size[1] // 7, size[0] * 3 // 4, size[1] * 3 // 4))
    for scale in (1, 2):
        fast = open_picture(data, mode).resized(box, 64, 48, scale=scale).astype(int)
        exact = open_picture(data, mode, exact=True).resized(box, 64, 48, scale=scale).astype(int)
        assert fast.shape == exact.shape == (48, 64, 3)
        assert np.abs(fast - exact).mean() < (0.5 if scale == 1 else 2)


def test_real_photographs_train_on_the_same_pixels(photographs: list[bytes]) -> None:
    spec = ImageSpec(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    transforms = [TrainTransform(spec, AugmentConfig(erasing=0.5), kind) for kind in ("fast", "exact")]
    differences = []
    for key, data in enumerate(photographs):
        fast, exact = (transform(data, key) for transform in transforms)
        assert fast.erase == exact.erase
        differences.append(np.abs(fast.image.astype(int) - exact.image).mean())
    assert np.mean(differences) < 0.2
    assert max(differences) < 4
    assert max(differences) > 0  # or both took one path


def test_real_photographs_are_evaluated_on_the_same_pixels(photographs: list[bytes]) -> None:
    spec = ImageSpec(224, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    fast, exact = EvalTransform(spec), EvalTransform(spec, decoder="exact")
    worst = max(np.abs(fast(data).image.astype(int) - exact(data).image).mean() for data in photographs)
    assert worst < 0.5


def test_which_decoder_takes_what() -> None:
    image = smooth(50, 40)
    assert isinstance(open_picture(saved(image, "JPEG"), MODES[0]), FastPicture)
    assert isinstance(open_picture(saved(image, "PNG"), MODES[0]), PlainPicture)
    assert isinstance(open_picture(saved(image.convert("CMYK"), "JPEG"), MODES[0]), PlainPicture)


def test_resizing_by_what_torch_lacks_is_pillows() -> None:
    image = smooth(50, 40)
    made = open_picture(saved(image, "PNG"), InterpolationMode.LANCZOS).resized((0, 0, 50, 40), 20, 16)
    assert np.array_equal(made, np.asarray(image.resize((20, 16), Image.Resampling.LANCZOS)))


def test_a_jpeg_that_only_pillow_forgives_is_decoded() -> None:
    """Bytes between the last block and the end marker: libjpeg warns, and the image is whole."""
    data = saved(smooth(64, 64), "JPEG")
    odd = data[:-2] + b"\x00\x01\x02" + data[-2:]
    made = open_picture(odd, MODES[0]).resized((0, 0, 64, 64), 32, 32)
    assert np.array_equal(made, open_picture(data, MODES[0]).resized((0, 0, 64, 64), 32, 32))


def test_a_truncated_jpeg_is_an_error() -> None:
    data = saved(smooth(300, 300), "JPEG")
    with pytest.raises(UndecodableImage, match="truncated"):
        open_picture(data[:-500], MODES[0]).resized((0, 0, 300, 300), 32, 32)
