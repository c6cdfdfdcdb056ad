from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from vit_efficient.data.config import AugmentConfig
from vit_efficient.data.decode import UndecodableImage
from vit_efficient.data.encode import encode_png
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.transforms import EvalTransform, TrainTransform, draw_crop, draw_erase
from vit_efficient.errors import DataError

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(80, 60), (61, 97), (48, 48), (20, 31)])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 0.9), ("bilinear", 0.875), ("bicubic", 1.0)])
def test_evaluation_is_timms_pixel_for_pixel(shape: tuple[int, int], interpolation: str, crop_pct: float) -> None:
    pixels = picture(*shape)
    spec = ImageSpec(32, MEAN, STD, interpolation, crop_pct)
    ours = EvalTransform(spec, decoder="exact")(encode_png(pixels)).image
    fast = EvalTransform(spec)(encode_png(pixels)).image
    timms = transforms_imagenet_eval(32, crop_pct, interpolation=interpolation, use_prefetcher=True)
    theirs = np.asarray(timms(Image.fromarray(pixels))).transpose(1, 2, 0)
    assert ours.shape == (32, 32, 3)
    assert np.array_equal(ours, theirs)
    assert np.abs(fast.astype(int) - theirs).max() <= 1


def test_eval_resize_overrides_the_crop_ratio() -> None:
    spec = ImageSpec(224, MEAN, STD, "bicubic", 0.9)
    assert EvalTransform(spec).resize == 248
    assert EvalTransform(spec, 256).resize == 256
    with pytest.raises(DataError, match="eval_resize=200 is smaller than the model's image size, 224"):
        EvalTransform(spec, 200)
    with pytest.raises(DataError, match=r"'cubic'.*bicubic"):
        EvalTransform(ImageSpec(224, MEAN, STD, "cubic", 0.9))


EVERYTHING = AugmentConfig(rand_augment=2, magnitude=9, erasing=0.5, flip=0.5)


def test_a_key_decides_everything_and_leaves_the_global_generator_alone(image: ImageSpec) -> None:
    data = encode_png(picture(40, 30))
    transform = TrainTransform(image, EVERYTHING)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = transform(data, 7)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(99)
    again = transform(data, 7)
    assert np.array_equal(first.image, again.image)
    assert first.erase == again.erase
    others = [transform(data, key).image for key in range(20)]
    assert sum(np.array_equal(first.image, other) for other in others) == 1


def test_no_augmentation_is_a_plain_resize(image: ImageSpec) -> None:
    pixels = picture(20, 20)
    plain = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)
    made = TrainTransform(image, plain)(encode_png(pixels), 3)
    assert np.array_equal(made.image, np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC)))
    assert made.erase == (0, 0, 0, 0)


def test_flip_happens_as_often_as_asked(image: ImageSpec) -> None:
    data = encode_png(picture(8, 8))
    plain = AugmentConfig(crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)
    straight = TrainTransform(image, plain)(data, 0).image
    transform = TrainTransform(image, plain.model_copy(update={"flip": 0.3}))
    flipped = 0
    for key in range(500):
        made = transform(data, key).image
        is_flipped = np.array_equal(made, straight[:, ::-1])
        assert is_flipped or np.array_equal(made, straight)
        flipped += is_flipped
    assert 110 < flipped < 190


@pytest.mark.parametrize(("width", "height"), [(500, 375), (7, 300), (300, 7), (1, 1)])
def test_crops_lie_inside_and_have_the_area_asked_for(width: int, height: int) -> None:
    rng = random.Random(0)
    areas = []
    for _ in range(400):
        x, y, w, h = draw_crop(rng, width, height, (0.08, 1.0), (3 / 4, 4 / 3))
        assert x >= 0
        assert y >= 0
        assert w >= 1
        assert h >= 1
        assert x + w <= width
        assert y + h <= height
        areas.append(w * h / (width * height))
    if (width, height) == (500, 375):
        assert min(areas) < 0.12
        assert 0.4 < np.mean(areas) < 0.6


def test_crop_falls_back_to_the_largest_allowed() -> None:
    assert draw_crop(random.Random(), 300, 100, (1, 1), (1, 1)) == (100, 0, 100, 100)
    assert draw_crop(random.Random(), 100, 300, (1, 1), (1, 1)) == (0, 100, 100, 100)


def test_erase_boxes_have_timms_areas() -> None:
    rng = random.Random(0)
    boxes = np.array([draw_erase(rng, 64) for _ in range(1000)])
    assert (boxes[:, 0] + boxes[:, 2] <= 64).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 64).all()
    share = boxes[:, 2] * boxes[:, 3] / 64**2
    assert share.max() < 1 / 3 + 0.02
    assert share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)


def test_erasing_happens_as_often_as_asked(image: ImageSpec) -> None:
    transform = TrainTransform(image, AugmentConfig(erasing=0.25))
    data = encode_png(picture(12, 12))
    erased = sum(transform(data, key).erase[2] > 0 for key in range(400))
    assert 65 < erased < 135


def test_kinds_of_images(image: ImageSpec) -> None:
    """Grey, palette, alpha, 16 bits and CMYK all become 8-bit RGB."""
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    whole = EvalTransform(ImageSpec(8, MEAN, STD, "bicubic", 1.0))
    expected = np.repeat(grey[:, :, None], 3, 2)

    def saved(picture: Image.Image, kind: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return buffer.getvalue()

    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    for given in (
        Image.fromarray(grey),
        Image.fromarray(grey).convert("P"),
        Image.fromarray(grey).convert("RGBA"),
        deep,
    ):
        assert np.array_equal(whole(saved(given)).image, expected), given.mode
    assert whole(saved(Image.fromarray(expected).convert("CMYK"), "JPEG")).image.shape == (8, 8, 3)


@pytest.mark.parametrize("cut", [0, 5, 60, 400])
def test_a_damaged_image_is_an_error_of_its_own(image: ImageSpec, cut: int) -> None:
    data = encode_png(picture(40, 30))
    with pytest.raises(UndecodableImage):
        EvalTransform(image)(data[:cut])
    buffer = io.BytesIO()
    Image.fromarray(picture(40, 30)).save(buffer, "JPEG")
    with pytest.raises(UndecodableImage):
        EvalTransform(image)(buffer.getvalue()[:cut])
