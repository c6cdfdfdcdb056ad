"""How fast one core makes training images of encoded ones, beside the pipeline that most people run."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.transforms import v2

from vit_efficient.data.config import AugmentConfig
from vit_efficient.data.decode import decode
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.jpeg import read_frame
from vit_efficient.data.picture import interpolation
from vit_efficient.data.transforms import EvalTransform, TrainTransform

USUAL, OURS = "Pillow + torchvision v2", "fast"


@dataclass(frozen=True)
class Speed:
    """Images a second in each repetition."""

    name: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.rates))

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest repetition."""
        return min(self.rates), max(self.rates)


def usual_pipeline(size: int, mode: str) -> Callable[[bytes], torch.Tensor]:
    """Pillow decodes; torchvision v2 crops, resizes, flips: uint8 (3, size, size)."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=interpolation(mode), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def pipelines(size: int, mode: str) -> dict[str, Callable[[bytes], object]]:
    """What is compared, by name; all but the decoders alone end in a uint8 image of size x size."""
    spec = ImageSpec(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), mode, 0.875)
    keys = iter(range(1 << 62))
    fast, exact = (TrainTransform(spec, AugmentConfig(), kind) for kind in ("fast", "exact"))
    evaluation = EvalTransform(spec)
    return {
        USUAL: usual_pipeline(size, mode),
        OURS: lambda data: fast(data, next(keys)),
        "exact": lambda data: exact(data, next(keys)),
        "fast, evaluation": evaluation,
        "Pillow, decoding alone": decode,
        "simplejpeg, decoding alone": _full_decode,
    }


def _full_decode(data: bytes) -> object:
    if read_frame(data) is None:
        return decode(data)
    return simplejpeg.decode_jpeg(data, strict=False)


def compare_decoding(images: Sequence[bytes], size: int, mode: str, repetitions: int = 5) -> list[Speed]:
    """Time every pipeline on the same images, in turn, again and again, so that a slow minute hits all alike.

    Args:
        images: encoded.
        size: of the result, in pixels.
        mode: `bilinear` or `bicubic`.
        repetitions: of the whole round, after one that does not count.
    """
    contestants = pipelines(size, mode)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for repetition in range(repetitions + 1):
            for name, run in contestants.items():
                rate = len(images) / _seconds(partial(_all, run, images))
                if repetition:
                    rates[name].append(rate)
    finally:
        torch.set_num_threads(threads)
    return [Speed(name, tuple(values)) for name, values in rates.items()]


def _all(run: Callable[[bytes], object], images: Sequence[bytes]) -> None:
    for data in images:
        run(data)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
