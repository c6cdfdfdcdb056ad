from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.decode import UndecodableImage
from vit_efficient.data.deferred import Deferred
from vit_efficient.data.device import DeviceTransforms
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import Encoded
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.data.transforms import EvalTransform, TrainTransform
from vit_efficient.errors import DataError

SPEC = ImageSpec(64, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
SUBSAMPLED = (1, 2, 4, 6)  # of `images`
SIZES = [(150, 110), (90, 260), (401, 333), (64, 64), (700, 500)]


def smooth(width: int, height: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 15, width // 15, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> list[bytes]:
    """JPEGs of all usual kinds, and two images that are not for nvJPEG."""
    made = [encoded(smooth(*size, seed), quality=92, subsampling=seed % 3) for seed, size in enumerate(SIZES)]
    made.append(encoded(smooth(120, 100, 9).convert("L")))
    made.append(encoded(smooth(120, 100, 8), progressive=True))
    made.append(encoded(smooth(120, 100, 7), "PNG"))
    made.append(encoded(smooth(120, 100, 6).convert("CMYK")))
    return made


def written(make_shards: Callable[..., ShardSet], files: list[bytes]) -> str:
    samples = [Encoded(f"{number:05d}", data, "jpg", number % 3) for number, data in enumerate(files)]
    return str(make_shards([len(samples)], samples=samples).folder)


def batches(shards: str, decoder: str, device: str) -> list[tuple[list[str], torch.Tensor]]:
    """Keys and normalised images of one epoch of training and of one evaluation."""
    config = DataConfig(source=DigitsConfig(), shards=shards, eval_shards=shards, batch_size=4, decoder=decoder)
    data = ViTDataModule(config, AugmentConfig(), SPEC, seed=3, workers=1)
    transforms = DeviceTransforms(SPEC, 3)
    made = []
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            made.append((batch["key"], transforms.eval()(moved)[0].cpu()))
    data.teardown("fit")
    return made


@pytest.mark.gpu
def test_the_gpu_makes_the_same_images(make_shards: Callable[..., ShardSet]) -> None:
    """Same crops, same flips, same rows. nvJPEG repeats chroma where libjpeg interpolates it, so that the colours of
    subsampled images differ at edges, and their brightness hardly."""
    shards = written(make_shards, images())
    brightness = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    ours, theirs = batches(shards, "device", "cuda"), batches(shards, "exact", "cpu")
    for (keys, on_gpu), (same_keys, on_cpu) in zip(ours, theirs, strict=True):
        assert keys == same_keys
        difference = (on_gpu - on_cpu) * 127.5
        assert (difference * brightness).sum(1).abs().mean((1, 2)).max() < 1.5
        for key, colour in zip(keys, difference.abs().mean((1, 2, 3)).tolist(), strict=True):
            assert colour < (8 if int(key) in SUBSAMPLED else 1), key


def test_jpegs_are_left_to_the_device_and_nothing_else() -> None:
    for transform in (TrainTransform(SPEC, AugmentConfig(), "device"), EvalTransform(SPEC, None, "device")):
        kinds = [isinstance(transform(data, 5).image, Deferred) for data in images()]
        assert kinds == [True] * 7 + [False] * 2


def test_what_is_left_is_what_the_cpu_would_do() -> None:
    """The recipe that travels, carried out by Pillow, gives the pixels of `exact`."""
    for key, data in enumerate(images()[:7]):
        for make in (lambda d: TrainTransform(SPEC, AugmentConfig(), d), lambda d: EvalTransform(SPEC, None, d)):
            left, exact = make("device")(data, key).image, make("exact")(data, key).image
            assert isinstance(left, Deferred)
            x, y, width, height = left.box
            image = Image.open(io.BytesIO(left.data)).convert("RGB").crop((x, y, x + width, y + height))
            image = image.resize(left.resized, Image.Resampling.BICUBIC)
            right, down = left.corner
            made = np.asarray(image)[down : down + left.size, right : right + left.size]
            assert np.array_equal(made[:, ::-1] if left.flip else made, exact)


def test_a_jpeg_without_its_end_is_not_left_to_the_device() -> None:
    """nvJPEG would make grey of what is missing; the CPU's decoders say that it is missing."""
    with pytest.raises(UndecodableImage, match="truncated"):
        EvalTransform(SPEC, None, "device")(images()[0][:-300])


@pytest.mark.gpu
def test_a_damaged_image_is_named(make_shards: Callable[..., ShardSet]) -> None:
    whole = encoded(smooth(400, 300, 1))
    tables = whole.index(b"\xff\xc4") + 5
    damaged = whole[:tables] + b"\xff" * 16 + whole[tables + 16 :]
    with pytest.raises(DataError, match="sample 00001: the image cannot be decoded"):
        batches(written(make_shards, [whole, damaged, whole]), "device", "cuda")
