"""What a whole loader delivers: shards, decoding, batches, processes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec


@dataclass(frozen=True)
class Load:
    """Images a second that a loader with so many workers delivered, over `images` of them."""

    workers: int
    rate: float
    images: int


def measure_loader(config: DataConfig, image: ImageSpec, workers: int, seconds: float = 5.0) -> Load:
    """Iterate over training batches, beyond an epoch if need be, for about `seconds`.

    The first batches, which wait for the workers to start, do not count.
    """
    data = ViTDataModule(config, AugmentConfig(), image, workers=workers, strict=False)
    try:
        return _measure(data, workers, seconds)
    finally:
        data.teardown("fit")


def _measure(data: ViTDataModule, workers: int, seconds: float) -> Load:
    loader = data.train_dataloader()
    delivered, warm, images, began = 0, 4 * max(1, workers), 0, 0.0
    for epoch in range(1 << 30):
        data.cursor.epoch, data.cursor.step = epoch, 0
        for batch in loader:
            delivered += 1
            if delivered == warm:
                began = time.perf_counter()
            elif delivered > warm:
                images += len(batch["key"])
                elapsed = time.perf_counter() - began
                if elapsed > seconds and delivered > warm + 2 * workers:
                    return Load(workers, images / elapsed, images)
    raise AssertionError("an endless loop has ended")
