"""Shards from a real HTTP server, well and ill behaved, through real loader processes."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.resolve import open_shards, resolve_shards
from vit_efficient.data.samples import BadSample
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shards import read_index
from vit_efficient.errors import DataError

pytestmark = pytest.mark.timeout(60)

COUNTS = [5, 3, 6]
FAST = RemoteConfig(timeout=0.5, attempts=4)


@pytest.fixture
def made(make_shards: Callable[..., ShardSet]) -> ShardSet:
    make_shards([4], "val")
    return make_shards(COUNTS)


def shard(number: int, split: str = "train") -> str:
    return f"{split}/part{number}-000000.tar"


def module(url: str, image: ImageSpec, remote: RemoteConfig = FAST, workers: int = 2, **data: Any) -> ViTDataModule:
    config = DataConfig(source={"name": "digits"}, shards=url, batch_size=4, streams=3, remote=remote, **data)
    return ViTDataModule(config, AugmentConfig(), image, workers=workers)


def keys(batches: Iterable[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key, weight in zip(batch["key"], batch["weight"], strict=True) if weight]


ALL = sorted(f"{number:05d}" for number in range(sum(COUNTS)))


@pytest.mark.parametrize("text", ["", "/", "/train", "/train/", "/train/part{0..2}-000000.tar"])
def test_every_sample_once(made: ShardSet, server: Any, image: ImageSpec, text: str) -> None:
    data = module(server.url + text, image)
    for epoch in range(2):
        data.cursor.epoch = epoch
        assert sorted(keys(data.train_dataloader())) == ALL
    assert len(keys(data.val_dataloader())) == 4
    data.teardown("fit")


def test_the_same_batches_as_from_a_folder(made: ShardSet, server: Any, image: ImageSpec) -> None:
    batches = []
    for where in (str(made.folder), f"{server.url}/train"):
        data = module(where, image, workers=1)
        batches.append([(batch["key"], batch["image"].sum().item()) for batch in data.train_dataloader()])
        data.teardown("fit")
    assert batches[0] == batches[1]


def test_only_what_is_asked_for_is_fetched(made: ShardSet, server: Any) -> None:
    shards = resolve_shards(f"{server.url}/train", remote=FAST).train
    assert shards is not None
    server.requests.clear()
    with ShardReader(shards, 3) as reader:
        reader.read(2, 4)
    row = read_index(made.path(2), 6)[4]
    ranges = [asked for _, file, asked in server.requests if file.endswith(".tar")]
    assert ranges == [f"bytes={row['offset']}-{row['offset'] + row['length'] - 1}"]


@pytest.mark.parametrize("fault", ["stall", "drop", 500, 503, 429])
def test_what_passes_is_tried_again(made: ShardSet, server: Any, image: ImageSpec, fault: str | int) -> None:
    for number in range(3):
        server.faults[shard(number)] = [fault, fault]
    server.faults["train/manifest.json"] = [fault]
    server.faults["train/part1-000000.idx.npy"] = [fault]
    data = module(f"{server.url}/train", image)
    began = time.monotonic()
    assert sorted(keys(data.train_dataloader())) == ALL
    assert time.monotonic() - began < 20
    data.teardown("fit")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("stall", "gave up after 4 attempts .* the server did not answer in time"),
        (500, "gave up after 4 attempts .* status 500"),
        (404, "there is no such file"),
        (403, "the server refuses access"),
        (401, "the server asks for credentials"),
        (400, "the server answers with status 400"),
        ("no ranges", "the server sends whole files only, .* Set data.remote.cache"),
    ],
)
def test_what_stays_is_an_error_that_names_the_shard(
    made: ShardSet, server: Any, image: ImageSpec, fault: str | int, said: str
) -> None:
    server.always[shard(1)] = fault
    data = module(f"{server.url}/train", image)
    with pytest.raises(DataError, match=rf"part1-000000\.tar: {said}") as caught:
        keys(data.train_dataloader())
    assert "Traceback" not in str(caught.value)
    denied = fault in (400, 401, 403, 404, "no ranges")
    if denied:
        assert server.count(shard(1)) <= 3  # the loader's processes' first ones; none is repeated


@pytest.mark.parametrize("fault", ["no ranges", "unsaid"])
def test_a_server_without_ranges_serves_a_cache(
    made: ShardSet, server: Any, image: ImageSpec, tmp_path: Path, fault: str
) -> None:
    server.always = {shard(number): fault for number in range(3)}
    server.faults[shard(1)] = [fault, "drop", 500]
    data = module(f"{server.url}/train", image, FAST.model_copy(update={"cache": tmp_path / "cache"}))
    assert sorted(keys(data.train_dataloader())) == ALL
    assert [server.count(shard(number)) for number in (0, 2)] == [2, 2]  # a part in vain, and the whole
    assert server.count(shard(1)) == 4
    data.teardown("fit")


def test_a_server_that_is_not_there(image: ImageSpec) -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/train/manifest\.json: gave up after 4 attempts"):
        module("http://user:secret@127.0.0.1:9/train", image)


def test_nothing_at_the_url(made: ShardSet, server: Any, image: ImageSpec) -> None:
    with pytest.raises(DataError, match=r"data\.shards=http://.*/nowhere: there is no manifest\.json"):
        module(f"{server.url}/nowhere", image)
    (made.folder.parent / "val" / "manifest.json").unlink()
    with pytest.raises(DataError, match="Nothing to evaluate on"):
        module(f"{server.url}/train", image)
    with pytest.raises(DataError, match=r"does not list part3-000000\.tar and 4 more") as caught:
        module(f"{server.url.replace('//', '//me:secret@')}/train/part{{0..7}}-000000.tar", image)
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match=r"a URL with \?"):
        module(f"{server.url}/train?signature=secret", image)


def test_credentials_are_never_shown(made: ShardSet, server: Any) -> None:
    url = server.url.replace("http://", "http://user:secret@")
    server.always[shard(0)] = 500
    shards = open_shards(f"{url}/train", "data.shards", "train", FAST)
    assert "secret" not in str(shards.folder)
    with ShardReader(shards, 3) as reader, pytest.raises(DataError) as caught:
        reader.read(0, 0)
    assert "secret" not in str(caught.value)
    assert "part0-000000.tar" in str(caught.value)


def alter(path: Path, sample: int, count: int) -> None:
    row = read_index(path, count)[sample]
    data = bytearray(path.read_bytes())
    data[int(row["offset"] + row["length"]) - 600] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("cached", [False, True])
def test_an_altered_sample_is_caught_and_named(
    made: ShardSet, server: Any, image: ImageSpec, tmp_path: Path, cached: bool, caplog: Any
) -> None:
    alter(made.path(2), 4, 6)  # sample 12 of all
    remote = FAST.model_copy(update={"cache": tmp_path / "cache" if cached else None})
    data = module(f"{server.url}/train", image, remote)
    with pytest.raises(DataError, match=r"part2-000000\.tar, sample 00012 \(number 4\): .*checksum"):
        keys(data.train_dataloader())
    data = module(f"{server.url}/train", image, remote, on_error="skip", max_skipped=0.1)
    assert sorted(keys(data.train_dataloader())) == [key for key in ALL if key != "00012"]
    assert data.skipped == 1
    assert "sample 00012" in caplog.text
    data.teardown("fit")
    if cached:  # the altered shard is not kept, the others are
        kept = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
        assert kept == {made.manifest.shards[0].sha256, made.manifest.shards[1].sha256}


@pytest.mark.parametrize("cached", [False, True])
def test_a_truncated_shard_loses_what_it_lacks_and_no_more(
    made: ShardSet, server: Any, image: ImageSpec, tmp_path: Path, cached: bool
) -> None:
    row = read_index(made.path(2), 6)[4]
    os.truncate(made.path(2), int(row["offset"]) + 100)  # samples 12 and 13
    remote = FAST.model_copy(update={"cache": tmp_path / "cache" if cached else None})
    data = module(f"{server.url}/train", image, remote)
    with pytest.raises(DataError, match=r"part2-000000\.tar is truncated: sample number [45]"):
        keys(data.train_dataloader())
    data = module(f"{server.url}/train", image, remote, on_error="skip", max_skipped=0.2)
    assert sorted(keys(data.train_dataloader())) == [key for key in ALL if key not in ("00012", "00013")]
    assert data.skipped == 2
    data = module(f"{server.url}/train", image, remote, on_error="skip", max_skipped=0.1)
    with pytest.raises(DataError, match=r"(?s)2 samples of one epoch had to be left out.*\(1 on each.*sample number 4"):
        keys(data.train_dataloader())


def test_samples_of_a_batch_are_fetched_side_by_side(made: ShardSet, server: Any) -> None:
    """Five samples of a server that takes 3 s for each come in well under 15 s."""
    shards = open_shards(f"{server.url}/train", "data.shards", "train", RemoteConfig(timeout=3.0, attempts=3))
    server.faults[shard(0)] = ["stall"] * 5
    with ShardReader(shards, 3) as reader:
        began = time.monotonic()
        found = [read().key for read in reader.read_all([0] * 5, range(5))]
        assert time.monotonic() - began < 10
    assert found == ["00000", "00001", "00002", "00003", "00004"]


def test_one_bad_sample_does_not_spoil_the_batch(made: ShardSet, server: Any) -> None:
    alter(made.path(0), 2, 5)
    shards = open_shards(f"{server.url}/train", "data.shards", "train", FAST)
    with ShardReader(shards, 3) as reader:
        reads = list(reader.read_all([0] * 5, range(5)))
    assert [reads[number]().key for number in (0, 1, 3, 4)] == ["00000", "00001", "00003", "00004"]
    with pytest.raises(BadSample):
        reads[2]()


def test_a_pickled_reader_opens_connections_of_its_own(made: ShardSet, server: Any) -> None:
    shards = open_shards(f"{server.url}/train", "data.shards", "train", FAST)
    with ShardReader(shards, 3) as reader:
        sample = reader.read(0, 0)
        assert pickle.loads(pickle.dumps(reader)).read(0, 0) == sample


def test_a_scheme_that_nobody_knows(image: ImageSpec) -> None:
    with pytest.raises(DataError, match=r"fsspec knows no parsec://"):
        module("parsec://far/away", image)


def test_anything_that_fsspec_opens(made: ShardSet, image: ImageSpec) -> None:
    data = module(f"file://{made.folder}", image)
    assert sorted(keys(data.train_dataloader())) == ALL
    data.teardown("fit")


def test_a_shard_that_cannot_be_had_is_tried_once_a_batch(made: ShardSet, server: Any) -> None:
    """Not once a sample: with all attempts and pauses, that would look like a hang."""
    server.always["train/part0-000000.idx.npy"] = 500
    shards = open_shards(f"{server.url}/train", "data.shards", "train", FAST)
    with ShardReader(shards, 3) as reader:
        reads = list(reader.read_all([0] * 5, range(5)))
        for read in reads:
            with pytest.raises(DataError, match="part0-000000"):
                read()
    assert server.count("part0-000000.idx.npy") == FAST.attempts
