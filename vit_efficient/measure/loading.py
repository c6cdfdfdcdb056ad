"""What a whole loader delivers: shards, decoding, batches, processes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec


@dataclass(frozen=True)
class Load:
    """Images a second that a loader with so many workers delivered, over `images` of them, in batches of so many."""

    workers: int
    rate: float
    images: int
    batch_size: int


def measure_loader(config: DataConfig, image: ImageSpec, workers: int, seconds: float = 5.0) -> Load:
    """Iterate over training batches, beyond an epoch if need be, for about `seconds`, after a third as long uncounted.

    Workers start, files come into the page cache and memory is touched for the first time before the clock runs.
    """
    data = ViTDataModule(config, AugmentConfig(), image, workers=workers, strict=False)
    data.config = config.model_copy(update={"batch_size": _even(data.train_images, config.batch_size)})
    try:
        return _measure(data, workers, seconds)
    finally:
        data.teardown("fit")


def _even(images: int, batch_size: int) -> int:
    """The largest batch up to `batch_size` that leaves no short one at the end of a short epoch.

    Workers take batches in turn: with two an epoch, every other worker would only ever get the short one, and wait.
    """
    if images > 100 * batch_size:
        return batch_size
    return max(size for size in range(1, min(batch_size, images) + 1) if images % size == 0)


def _measure(data: ViTDataModule, workers: int, seconds: float) -> Load:
    loader = data.train_dataloader()
    images, began, counting = 0, time.perf_counter(), False
    for epoch in range(1 << 30):
        data.cursor.epoch, data.cursor.step = epoch, 0
        for number, batch in enumerate(loader, epoch * len(loader)):
            elapsed = time.perf_counter() - began
            if counting:
                images += len(batch["key"])
                if elapsed > seconds:
                    return Load(workers, images / elapsed, images, data.config.batch_size)
            elif elapsed > seconds / 3 and number > 4 * workers:
                counting, began = True, time.perf_counter()
    raise AssertionError("an endless loop has ended")
