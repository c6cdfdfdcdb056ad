"""One batch again and again in place of a data set: what a training step takes where nothing has to be loaded."""

from __future__ import annotations

from collections.abc import Iterator

import lightning
import torch

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.loader import Cursor
from vit_efficient.data.stream import Batch, Layout


class FixedLoader:
    """The same micro-batch `steps` times `layout.accumulate`, numbered as those of `SampleStream` are."""

    def __init__(self, batch: Batch, layout: Layout, steps: int) -> None:
        self.batch, self.layout, self.steps = batch, layout, steps

    def __len__(self) -> int:
        return self.steps * self.layout.accumulate

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.steps):
            for micro in range(self.layout.accumulate):
                yield self.batch | {"step": step, "micro": self.layout.piece(micro).number}


class FixedData(ViTDataModule):
    """Random pixels and labels, the same in every step and others on every rank; pinned where there is a GPU.

    Nothing is read, and there is nothing to evaluate: the trainer must be told to leave that out.

    Args:
        config: of it, `batch_size` alone matters.
        augment: whether there are boxes to erase; what the device does is done.
        num_classes: of the labels.
        steps: of the epoch.
        micro_batch: images that a rank trains on at once.
        seed: of pixels and labels.
    """

    def __init__(
        self,
        config: DataConfig,
        augment: AugmentConfig,
        *,
        num_classes: int,
        steps: int,
        micro_batch: int,
        seed: int = 0,
    ) -> None:
        lightning.LightningDataModule.__init__(self)  # not that of `ViTDataModule`, which looks for shards
        self.config, self.augment, self.image, self.seed = config, augment, None, seed
        self.micro_batch, self.eval_batch, self.workers = micro_batch, None, 0
        self.cursor = Cursor()
        self._train = self._train_loader = self._eval_loader = None
        self._skipped = 0
        self._classes, self._steps = num_classes, steps

    @property
    def class_names(self) -> list[str]:
        return [str(number) for number in range(self._classes)]

    @property
    def steps_per_epoch(self) -> int:
        return self._steps

    def train_dataloader(self) -> FixedLoader:  # type: ignore[override]
        """This rank's batch, as many times as an epoch has micro-batches."""
        rank, world = self._ranks()
        layout = Layout(self.config.batch_size, rank, world, self.accumulate(world))
        count = self.config.batch_size // (world * layout.accumulate)
        return FixedLoader(self._batch(count, rank), layout, self._steps)

    def _batch(self, count: int, rank: int) -> Batch:
        size = self._image().size
        generator = torch.Generator().manual_seed(self.seed + rank)
        pixels = torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8)
        batch: Batch = {
            "image": pixels.permute(0, 3, 1, 2),
            "label": torch.randint(self._classes, (count,), generator=generator),
            "weight": torch.ones(count),
            "position": torch.arange(count),
        }
        if self.augment.erasing > 0:
            side = max(1, size // 3)
            batch["erase"] = torch.tensor([0, 0, side, side]).repeat(count, 1)
        if self._pins():
            batch = {name: value.pin_memory() for name, value in batch.items()}
        return batch | {"key": [str(number) for number in range(count)], "count": self.config.batch_size, "epoch": 0}
