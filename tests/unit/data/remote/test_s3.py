"""Shards in a bucket, from moto's real HTTP server; skipped where it or s3fs is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.remote.folder import RemoteFolder
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shards import read_index
from vit_efficient.errors import DataError

pytestmark = pytest.mark.timeout(120)
pytest.importorskip("s3fs", reason="needs s3fs: the extra `s3`")
COUNTS = [5, 3, 6]
ALL = sorted(f"{number:05d}" for number in range(sum(COUNTS)))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket `images`, and the environment by which s3fs finds it."""
    boto3 = pytest.importorskip("boto3")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    made = boto3.resource("s3").create_bucket(Bucket="images")
    yield made
    made.objects.delete()
    made.delete()


@pytest.fixture
def made(make_shards: Callable[..., ShardSet]) -> ShardSet:
    make_shards([4], "val")
    return make_shards(COUNTS)


def upload(bucket: Any, folder: Path) -> None:
    for path in folder.rglob("*.*"):
        bucket.upload_file(str(path), str(path.relative_to(folder)))


def module(image: ImageSpec, cache: Path | None = None, **data: Any) -> ViTDataModule:
    remote = RemoteConfig(timeout=5.0, attempts=2, cache=cache)
    config = DataConfig(
        source={"name": "digits"}, shards="s3://images/train", batch_size=4, streams=3, remote=remote, **data
    )
    return ViTDataModule(config, AugmentConfig(), image, workers=2)


def keys(made: ViTDataModule) -> list[str]:
    batches = list(made.train_dataloader())
    made.teardown("fit")
    return [key for batch in batches for key, weight in zip(batch["key"], batch["weight"], strict=True) if weight]


@pytest.mark.parametrize("cached", [False, True])
def test_every_sample_once(made: ShardSet, bucket: Any, image: ImageSpec, tmp_path: Path, cached: bool) -> None:
    upload(bucket, made.folder.parent)  # type: ignore[union-attr]
    data = module(image, tmp_path / "cache" if cached else None)
    assert sorted(keys(data)) == ALL
    assert len({path.name for path in tmp_path.glob("cache/*.tar")}) == (3 if cached else 0)


@pytest.mark.parametrize("cached", [False, True])
def test_a_truncated_shard_loses_what_it_lacks(
    made: ShardSet, bucket: Any, image: ImageSpec, tmp_path: Path, cached: bool
) -> None:
    """One sample is cut, and one lies past the end, where S3 answers with an error of its own."""
    row = read_index(made.path(2), 6)[4]
    os.truncate(made.path(2), int(row["offset"]) + 100)
    upload(bucket, made.folder.parent)  # type: ignore[union-attr]
    cache = tmp_path / "cache" if cached else None
    with pytest.raises(DataError, match=r"s3://images/train/part2-000000\.tar is truncated: sample number [45]"):
        keys(module(image, cache))
    data = module(image, cache, on_error="skip", max_skipped=0.2)
    assert sorted(keys(data)) == [key for key in ALL if key not in ("00012", "00013")]


def test_what_is_not_there(bucket: Any, image: ImageSpec) -> None:
    with pytest.raises(DataError, match=r"data\.shards=s3://images/train: there is no manifest\.json"):
        module(image)


def test_no_server_and_no_credentials_are_errors_of_ours(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RemoteFolder("s3://images/train", RemoteConfig(timeout=1.0, attempts=1, patience=4.0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"s3://images/train/x: gave up after 1 attempt"):
        folder.read("x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    folder = RemoteFolder("s3://images/train", RemoteConfig(timeout=1.0, attempts=1))
    with pytest.raises(DataError, match=r"refuses access \(Unable to locate credentials\)"):
        folder.read("x")
