"""One batch in place of a data set: what training sees of it is what it would see of real shards."""

from __future__ import annotations

import torch

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.fixed import FixedData
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.stream import Layout

IMAGE = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 1.0)
CONFIG = DataConfig(source={"name": "digits"}, batch_size=12)


def fixed(augment: AugmentConfig | None = None, **options: int) -> FixedData:
    data = FixedData(CONFIG, augment or AugmentConfig(), **{"num_classes": 10, "steps": 3, "micro_batch": 12} | options)
    data.set_image(IMAGE)
    return data


def test_a_batch_is_like_a_real_one() -> None:
    """The same names, kinds and shapes, boxes to erase included, and the same order of bytes."""
    augment = AugmentConfig(erasing=0.5)
    real = next(iter(ViTDataModule(CONFIG, augment, IMAGE).train_dataloader()))
    ours = next(iter(fixed(augment).train_dataloader()))
    assert ours.keys() == real.keys()
    for name, value in real.items():
        assert type(ours[name]) is type(value), name
        if isinstance(value, torch.Tensor):
            same = [(t.dtype, t.shape, t.stride()) for t in (ours[name], value)]
            assert same[0] == same[1], name
    assert ours["count"] == real["count"]
    assert "erase" not in next(iter(fixed().train_dataloader()))


def test_micro_batches_are_numbered_as_real_ones_are() -> None:
    loader = fixed(micro_batch=4).train_dataloader()
    assert len(loader) == 9
    batches = list(loader)
    assert [(b["step"], b["micro"]) for b in batches] == [(step, micro) for step in range(3) for micro in range(3)]
    assert {len(b["label"]) for b in batches} == {4}
    loader.layout = Layout(12, rank=1, world=2, accumulate=3)
    assert [b["micro"] for b in loader][:3] == [3, 4, 5]


def test_ranks_have_other_images() -> None:
    one, two = (fixed()._batch(4, rank) for rank in (0, 1))
    assert not torch.equal(one["image"], two["image"])
    assert torch.equal(one["image"], fixed()._batch(4, 0)["image"])
    assert int(one["label"].max()) < 10


def test_nothing_is_kept_of_it_in_a_checkpoint() -> None:
    data = fixed()
    assert data.state_dict() == {}
    assert (data.num_classes, data.steps_per_epoch, data.skipped, data.wait_seconds) == (10, 3, 0, 0.0)
    data.mark_step(0, 2)
    assert (data.cursor.epoch, data.cursor.step) == (0, 2)
