from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from vit_efficient.data.config import AugmentConfig
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.plan import Plan
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.samples import BadSample
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import Encoded
from vit_efficient.data.stream import Batch, Failure, Layout, SampleStream
from vit_efficient.data.transforms import EvalTransform, TrainTransform

Make = Callable[..., ShardSet]
AUGMENT = AugmentConfig(rand_augment=1, erasing=0.5)
BATCH = 8


def stream(
    shards: ShardSet, image: ImageSpec, layout: Layout, start: int = 0, stop: int | None = None, **options: bool
) -> SampleStream:
    plan = Plan([entry.samples for entry in shards.manifest.shards], seed=3, streams=4)
    transform = TrainTransform(image, AUGMENT)
    return SampleStream(ShardReader(shards, 3), plan, transform, layout, seed=3, start=start, stop=stop, **options)


def seen(batches: Iterable[Batch]) -> dict[tuple[int, int], tuple[str, int, bytes, tuple[int, ...]]]:
    """By (step, position): everything that a sample is."""
    found = {}
    for batch in batches:
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        for row, key in enumerate(batch["key"]):
            if batch["weight"][row] == 0:
                continue
            place = (batch["step"], int(batch["position"][row]))
            assert place not in found
            pixels = batch["image"][row].numpy().tobytes()
            found[place] = (key, int(batch["label"][row]), pixels, tuple(batch["erase"][row].tolist()))
    return found


@pytest.fixture
def whole(make_shards: Make, image: ImageSpec) -> tuple[ShardSet, dict]:
    """19 samples in uneven shards: 3 steps an epoch, the last of 3 samples; two epochs."""
    shards = make_shards([7, 1, 5, 6])
    return shards, seen(stream(shards, image, Layout(BATCH), stop=6))


def test_every_sample_once_an_epoch(whole: tuple[ShardSet, dict]) -> None:
    _, found = whole
    for epoch in (0, 1):
        keys = [value[0] for (step, _), value in found.items() if step // 3 == epoch]
        assert sorted(keys) == [f"{number:05d}" for number in range(19)]
    first, second = ([v[0] for (s, _), v in found.items() if s // 3 == epoch] for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize(("world", "accumulate"), [(1, 2), (2, 1), (3, 1), (2, 2), (8, 1), (5, 2)])
def test_ranks_and_micro_batches_change_neither_samples_nor_pixels(
    whole: tuple[ShardSet, dict], image: ImageSpec, world: int, accumulate: int
) -> None:
    shards, expected = whole
    found: dict = {}
    sizes = set()
    for rank in range(world):
        batches = list(stream(shards, image, Layout(BATCH, rank, world, accumulate), stop=6))
        sizes.add(len(batches))
        assert all(len(batch["key"]) for batch in batches)  # at least a filler
        part = seen(batches)
        assert not found.keys() & part.keys()
        found |= part
    assert sizes == {6 * accumulate}  # nobody waits for anybody
    assert found == expected


def test_augmentation_belongs_to_sample_and_epoch_not_to_position(
    whole: tuple[ShardSet, dict], image: ImageSpec
) -> None:
    shards, expected = whole
    other = stream(shards, image, Layout(BATCH), stop=6)
    other.plan = Plan(other.plan.counts, seed=3, streams=1)  # another order
    found = seen(other)

    def by_sample(of: dict) -> dict:
        return {(step // 3, value[0]): value for (step, _), value in of.items()}

    assert found != expected
    assert by_sample(found) == by_sample(expected)
    changed = [by_sample(found)[0, key] != by_sample(found)[1, key] for _, key in by_sample(found)]
    assert all(changed)


@pytest.mark.parametrize("start", range(6))
def test_a_start_anywhere_gives_what_would_have_come(
    whole: tuple[ShardSet, dict], image: ImageSpec, start: int
) -> None:
    shards, expected = whole
    resumed: dict = {}
    for rank in range(2):  # on another number of ranks
        resumed |= seen(stream(shards, image, Layout(BATCH, rank, 2), start=start, stop=6))
    assert resumed == {place: value for place, value in expected.items() if place[0] >= start}


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing_not_even_the_order(
    whole: tuple[ShardSet, dict], image: ImageSpec, workers: int
) -> None:
    shards, expected = whole
    loader = DataLoader(
        stream(shards, image, Layout(BATCH, accumulate=2), stop=6), batch_size=None, num_workers=workers
    )
    batches = list(loader)
    assert [(batch["step"], batch["micro"]) for batch in batches] == [divmod(number, 2) for number in range(12)]
    assert seen(batches) == expected


def test_what_a_batch_says(make_shards: Make, image: ImageSpec) -> None:
    layout = Layout(BATCH, rank=1, world=2, accumulate=2)
    batches = list(stream(make_shards([7, 4]), image, layout, start=2, stop=4))
    assert [(b["epoch"], b["step"], b["micro"], b["count"]) for b in batches] == [
        (1, 2, 2, 8), (1, 2, 3, 8), (1, 3, 2, 3), (1, 3, 3, 3),
    ]  # fmt: skip
    assert [len(b["key"]) for b in batches] == [2, 2, 1, 1]
    filler = batches[-1]
    assert filler["weight"].tolist() == [0.0]
    assert filler["position"].tolist() == [-1]
    assert filler["image"].shape == (1, 3, 8, 8)
    for batch in batches:
        size = len(batch["key"])
        assert batch["image"].shape == (size, 3, 8, 8)
        for name, dtype in (("label", torch.int64), ("weight", torch.float32), ("position", torch.int64)):
            assert batch[name].dtype == dtype
            assert batch[name].shape == (size,)
        assert batch["erase"].shape == (size, 4)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("samples", [1, 6, 19])
def test_evaluation_counts_every_sample_once(make_shards: Make, image: ImageSpec, world: int, samples: int) -> None:
    shards = make_shards([samples])
    plan = Plan([samples], shuffle=False)
    layouts = [Layout(3 * world, rank, world) for rank in range(world)]
    keys, lengths = [], set()
    for layout in layouts:
        steps = plan.steps(layout.batch_size)
        batches = list(SampleStream(ShardReader(shards, 3), plan, EvalTransform(image), layout, stop=steps))
        lengths.add(len(batches))
        keys += [key for b in batches for key, weight in zip(b["key"], b["weight"], strict=True) if weight > 0]
    assert sorted(keys) == [f"{number:05d}" for number in range(samples)]
    assert len(lengths) == 1


@pytest.fixture
def damaged(make_shards: Make) -> ShardSet:
    """Sample 4 of 6 is no image."""
    from vit_efficient.data.encode import encode_png

    good = encode_png(np.full((12, 12, 3), 200, np.uint8))
    return make_shards([6], samples=[Encoded(f"{i:05d}", b"text" if i == 4 else good, "png", 0) for i in range(6)])


def test_an_undecodable_image_is_named(damaged: ShardSet, image: ImageSpec) -> None:
    with pytest.raises(BadSample, match=r"part0-000000\.tar, sample 00004: .*not an image"):
        stream(damaged, image, Layout(6)).micro_batch(0, 0)
    (failure,) = list(stream(damaged, image, Layout(6), stop=1))
    assert isinstance(failure, Failure)
    assert "00004" in failure.message


def test_an_undecodable_image_can_be_left_out(damaged: ShardSet, image: ImageSpec) -> None:
    (batch,) = list(stream(damaged, image, Layout(6), stop=1, skip_bad=True))
    assert sorted(batch["weight"].tolist()) == [0, 1, 1, 1, 1, 1]
    row = batch["weight"].tolist().index(0)
    assert batch["key"][row] == ""
    assert batch["image"][row].abs().sum() == 0
    assert len(batch["skipped"]) == 1
    assert "00004" in batch["skipped"][0]
