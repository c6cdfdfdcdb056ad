"""How fast the GPU decodes (`data.decoder: device`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision.io import ImageReadMode, decode_jpeg

from vit_efficient.data.config import AugmentConfig
from vit_efficient.data.deferred import Deferred, DeferredImages, decode_on_device
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.transforms import TrainTransform

BATCH, ROUNDS = 256, 5


def measure_device(
    images: Sequence[bytes], size: int, mode: str, progress: Callable[[str], None]
) -> dict[str, Any] | None:
    """Images a second that one process decodes, crops and resizes on the GPU; None where there is no GPU."""
    if not torch.cuda.is_available():
        return None
    progress("decoding on the GPU")
    spec = ImageSpec(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), mode, 0.875)
    transform = TrainTransform(spec, AugmentConfig(), "device")
    deferred = DeferredImages()
    for row, data in enumerate(images):
        made = transform(data, row).image
        if isinstance(made, Deferred) and len(deferred.rows) < BATCH:
            deferred.add(row, made)
    device = torch.device("cuda", torch.cuda.current_device())
    files = [torch.frombuffer(bytearray(item.data), dtype=torch.uint8) for item in deferred.items]
    keys = [str(row) for row in range(len(images))]
    count = len(files)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "batch": count,
        "images_per_second": count / _seconds(lambda: decode_on_device(deferred, device, mode, keys)),
        "decoding_alone": count / _seconds(lambda: decode_jpeg(files, mode=ImageReadMode.RGB, device=device)),
    }


def _seconds(work: Callable[[], object]) -> float:
    """Median of a few rounds, after one that does not count."""
    taken = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[ROUNDS // 2]
