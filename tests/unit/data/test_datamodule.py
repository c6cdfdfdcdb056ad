from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing import active_children

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.encode import encode_png
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import Encoded
from vit_efficient.data.shards import read_index
from vit_efficient.errors import CheckpointError, DataError, RecipeError

Make = Callable[..., ShardSet]
BATCH, STEPS = 8, 3  # 19 samples


class Ranked(ViTDataModule):
    """A rank of several, without starting several processes."""

    ranks = (0, 1)

    def _ranks(self) -> tuple[int, int]:
        return self.ranks


@pytest.fixture
def shards(make_shards: Make) -> Path:
    make_shards([5, 2], "val")
    return make_shards([7, 1, 5, 6]).folder.parent


def module(
    shards: Path, image: ImageSpec, ranks: tuple[int, int] = (0, 1), data: dict[str, Any] | None = None, **options: Any
) -> Ranked:
    config = DataConfig(
        **{"source": {"name": "folder"}, "shards": str(shards), "batch_size": BATCH, "streams": 4, **(data or {})}
    )
    made = Ranked(config, AugmentConfig(rand_augment=1, erasing=0.5), image, **{"seed": 3, **options})
    made.ranks = ranks
    return made


def run(made: ViTDataModule, until: tuple[int, int]) -> dict[tuple[int, int], tuple[str, bytes]]:
    """Consume like a training loop up to (epoch, step): by (global step, position), key and pixels."""
    loader = made.train_dataloader()
    accumulate = made.accumulate()
    found = {}
    while (made.cursor.epoch, made.cursor.step) < until:
        for number, batch in enumerate(loader, 1):
            for row, key in enumerate(batch["key"]):
                if batch["weight"][row] > 0:
                    place = (batch["step"], int(batch["position"][row]))
                    found[place] = (key, batch["image"][row].numpy().tobytes())
            if number % accumulate == 0:
                epoch, step = divmod(batch["step"], made.steps_per_epoch)
                made.mark_step(epoch, step + 1)
                if (made.cursor.epoch, made.cursor.step) >= until:
                    break
    made.teardown("fit")
    return found


def test_what_is_known_before_there_is_a_model(shards: Path) -> None:
    made = ViTDataModule(
        DataConfig(source={"name": "folder"}, shards=str(shards), batch_size=BATCH), AugmentConfig(), None
    )
    assert made.train_images == 19
    assert made.eval_images == 7
    assert made.steps_per_epoch == STEPS
    assert made.num_classes == 3
    assert made.class_names == ["a", "b", "c"]
    assert made.class_counts == [7, 6, 6]
    assert made.train_manifest is not None
    assert made.eval_manifest.split == "val"
    with pytest.raises(ValueError, match="set `image`"):
        made.train_dataloader()


@pytest.mark.parametrize("at", [(0, 1), (0, 2), (1, 0), (1, 1)])
@pytest.mark.parametrize(("workers", "world", "micro_batch"), [(0, 1, 4), (2, 1, None), (0, 2, 2), (1, 4, None)])
def test_resume_anywhere_with_other_workers_and_ranks_gives_the_same_samples_and_pixels(
    shards: Path, image: ImageSpec, at: tuple[int, int], workers: int, world: int, micro_batch: int | None
) -> None:
    expected = run(module(shards, image), (2, 0))
    stopped = module(shards, image, workers=1)
    first = run(stopped, at)
    state = stopped.state_dict()
    rest: dict = {}
    for rank in range(world):
        resumed = module(shards, image, (rank, world), workers=workers, micro_batch=micro_batch)
        resumed.load_state_dict(state)
        rest |= run(resumed, (2, 0))
    assert not first.keys() & rest.keys()
    assert first | rest == expected


def test_the_cursor_is_what_was_consumed_not_what_was_prefetched(shards: Path, image: ImageSpec) -> None:
    made = module(shards, image, workers=1)
    batches = iter(made.train_dataloader())
    next(batches)
    next(batches)  # two are in hand and more are read ahead, but only one step is done
    made.mark_step(0, 1)
    assert (made.state_dict()["epoch"], made.state_dict()["step"]) == (0, 1)
    made.mark_step(0, STEPS)
    assert (made.state_dict()["epoch"], made.state_dict()["step"]) == (1, 0)
    made.teardown("fit")


def test_an_iteration_begins_where_the_cursor_is(shards: Path, image: ImageSpec) -> None:
    made = module(shards, image)
    loader = made.train_dataloader()
    assert len(loader) == STEPS
    assert [batch["step"] for batch in loader] == [0, 1, 2]
    assert [batch["step"] for batch in loader] == [0, 1, 2]  # nobody marked a step
    made.mark_step(1, 1)
    assert [batch["step"] for batch in loader] == [4, 5]


def test_workers_live_on_from_epoch_to_epoch(shards: Path, image: ImageSpec) -> None:
    made = module(shards, image, workers=2)
    loader = made.train_dataloader()
    pids = []
    for epoch in range(3):
        for step, _ in enumerate(loader):
            made.mark_step(epoch, step + 1)
        pids.append({child.pid for child in active_children()})
    assert pids[0] == pids[1] == pids[2]
    assert len(pids[0]) == 2
    assert loader.wait_seconds > 0
    assert made.wait_seconds == loader.wait_seconds
    made.teardown("fit")
    assert not active_children()


@pytest.mark.parametrize("key", ["fingerprint", "seed", "batch_size", "streams"])
def test_state_of_other_data_is_refused_by_name(shards: Path, image: ImageSpec, key: str) -> None:
    made = module(shards, image)
    state = {**made.state_dict(), key: 12345, "epoch": 1}
    names = {"fingerprint": r"data\.shards", "seed": r"run\.seed", "batch_size": r"data\.batch_size"}
    with pytest.raises(CheckpointError, match=rf"{names.get(key, 'data.streams')}.*: 12345 in the checkpoint"):
        made.load_state_dict(state)
    assert made.cursor.epoch == 0
    assert len(str(state)) < 300


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_exactly_once_again_and_again(shards: Path, image: ImageSpec, world: int, workers: int) -> None:
    loaders = [
        module(shards, image, (rank, world), workers=workers, eval_batch=2).val_dataloader() for rank in range(world)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    for _ in range(2):
        keys = []
        for loader in loaders:
            batches = list(loader)
            assert len(batches) == len(loader)
            for batch in batches:
                keys += [key for key, weight in zip(batch["key"], batch["weight"], strict=True) if weight > 0]
                assert batch["image"].shape[0] <= 2
        assert sorted(keys) == [f"{number:05d}" for number in range(7)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_stops_training_with_one_clear_error(shards: Path, image: ImageSpec, workers: int) -> None:
    path = next((shards / "train").glob("part3*.tar"))
    data = bytearray(path.read_bytes())
    data[1600] ^= 1
    path.write_bytes(data)
    made = module(shards, image, workers=workers)
    with pytest.raises(DataError, match=r"part3-000000\.tar, sample \d{5} .*checksum") as caught:
        run(made, (1, 0))
    assert "Traceback" not in str(caught.value)


def test_a_damaged_sample_can_be_left_out_and_is_counted(make_shards: Make, image: ImageSpec, caplog: Any) -> None:
    good = encode_png(np.full((12, 12, 3), 200, np.uint8))
    samples = [Encoded(f"{i:05d}", b"" if i == 4 else good, "png", 0) for i in range(6)]
    folder = make_shards([6], samples=samples).folder
    made = module(folder, image, data={"eval_shards": str(folder), "on_error": "skip"}, workers=1)
    assert len(run(made, (2, 0))) == 10
    assert made.skipped == 2
    assert "sample 00004" in caplog.text
    assert sum(int(batch["weight"].sum()) for batch in made.val_dataloader()) == 5
    assert made.skipped == 3


def test_a_truncated_shard_is_found_at_the_start(shards: Path, image: ImageSpec) -> None:
    path = next((shards / "train").glob("part0*.tar"))
    os.truncate(path, 3000)
    with pytest.raises(DataError, match=r"part0-000000\.tar is truncated"):
        module(shards, image)
    made = module(shards, image, strict=False)
    with pytest.raises(DataError, match="is truncated"):
        run(made, (1, 0))


def test_a_truncated_shard_loses_what_it_lacks_if_that_may_be_left_out(
    shards: Path, image: ImageSpec, caplog: Any
) -> None:
    path = next((shards / "train").glob("part0*.tar"))
    row = read_index(path, 7)[5]
    os.truncate(path, int(row["offset"]) + 10)  # the last two of seven
    made = module(shards, image, data={"on_error": "skip", "max_skipped": 0.2}, workers=2)
    assert "part0-000000.tar is truncated" in caplog.text
    assert sorted(key for key, _ in run(made, (1, 0)).values()) == [
        f"{number:05d}" for number in range(19) if number not in (5, 6)
    ]
    assert made.skipped == 2
    path.unlink()
    with pytest.raises(DataError, match=r"part0-000000\.tar is not there"):
        module(shards, image, data={"on_error": "skip"})


def test_what_was_left_out_is_counted_over_all_loaders(make_shards: Make, image: ImageSpec) -> None:
    good = encode_png(np.full((12, 12, 3), 200, np.uint8))
    samples = [Encoded(f"{i:05d}", b"" if i == 4 else good, "png", 0) for i in range(6)]
    folder = make_shards([6], samples=samples).folder
    made = module(folder, image, data={"eval_shards": str(folder), "on_error": "skip"})
    for _ in range(2):  # a run evaluates again when it is done, by a loader of its own
        list(made.train_dataloader())
        list(made.val_dataloader())
    assert made.skipped == 4


def test_evaluation_without_training_shards(make_shards: Make, image: ImageSpec) -> None:
    folder = make_shards([5], "val").folder
    made = module(folder, image, data={"shards": None, "eval_shards": str(folder)}, evaluate_only=True)
    assert made.class_names == ["a", "b", "c"]
    assert sum(int(batch["weight"].sum()) for batch in made.val_dataloader()) == 5
    assert made.state_dict() == {}
    with pytest.raises(DataError, match="nothing to train on"):
        made.train_dataloader()


def test_batches_that_do_not_divide(shards: Path, image: ImageSpec) -> None:
    with pytest.raises(RecipeError, match=r"data\.batch_size 8 cannot be shared|cannot be shared evenly by 3"):
        module(shards, image, (0, 3)).train_dataloader()
    with pytest.raises(RecipeError, match="micro_batch 3 does not divide"):
        module(shards, image, micro_batch=3).train_dataloader()
    assert module(shards, image, micro_batch=2).micro_batches_per_epoch(2) == STEPS * 2


def test_workers_ignore_an_interrupt(shards: Path, image: ImageSpec) -> None:
    """Ctrl-C reaches the whole process group; the main process must still get its batches, to save and to end."""
    made = module(shards, image, workers=1)
    loader = made.train_dataloader()
    batches: Iterable = iter(loader)
    assert next(iter(batches))["step"] == 0
    for child in active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGINT)
    assert [batch["step"] for batch in batches] == [1, 2]
    made.teardown("fit")


def test_workers_use_one_thread_and_leave_ours_alone(shards: Path, image: ImageSpec) -> None:
    before = torch.get_num_threads()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    run(module(shards, image), (1, 0))
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_prepare_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: ImageSpec) -> None:
    monkeypatch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path / "cache"))
    config = DataConfig(source={"name": "digits"}, batch_size=64)
    made = ViTDataModule(config, AugmentConfig(), image)
    assert (made.train_images, made.eval_images, made.num_classes) == (1437, 360, 10)
    assert next(iter(made.val_dataloader()))["image"].shape == (64, 3, 8, 8)
    with pytest.raises(DataError, match=r"data\.shards is not set.*prepare"):
        ViTDataModule(DataConfig(source={"name": "cifar10"}, batch_size=64), AugmentConfig(), image)
