from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from vit_efficient.data.encode import encode_png
from vit_efficient.data.files import atomic_writer
from vit_efficient.data.shard_writer import Encoded, ShardSize, write_shards
from vit_efficient.data.shards import index_path, read_index, scan_shard
from vit_efficient.errors import DataError


def images(count: int) -> list[Encoded]:
    return [Encoded(f"{i:03d}", encode_png(np.full((4, 4, 3), i, np.uint8)), "png", i % 5) for i in range(count)]


def test_a_shard_is_what_webdataset_reads(tmp_path: Path) -> None:
    given = images(7)
    scans = list(write_shards(given, tmp_path, "x", ShardSize(samples=3)))
    assert [scan.entry.samples for scan in scans] == [3, 3, 1]
    urls = [str(tmp_path / scan.entry.file) for scan in scans]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    read = [(row["__key__"], row["png"], int(row["cls"])) for row in dataset]
    assert read == [(one.key, one.image, one.label) for one in given]


def test_index_points_at_each_sample(tmp_path: Path) -> None:
    (scan,) = write_shards(images(5), tmp_path, "x", ShardSize(samples=9))
    path = tmp_path / scan.entry.file
    data = path.read_bytes()
    assert scan.entry.bytes == len(data)
    assert scan.entry.sha256 == hashlib.sha256(data).hexdigest()
    index = read_index(path, 5)
    assert index["label"].tolist() == [0, 1, 2, 3, 4]
    for number, row in enumerate(index):
        span = data[int(row["offset"]) : int(row["offset"] + row["length"])]
        assert zlib.crc32(span) == row["crc32"]
        with tarfile.open(fileobj=io.BytesIO(span)) as archive:
            assert archive.getnames() == [f"{number:03d}.cls", f"{number:03d}.png"]


def test_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        list(write_shards(images(6), tmp_path / name, "x", ShardSize(samples=4)))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_shards_end_at_a_size_in_bytes(tmp_path: Path) -> None:
    scans = list(write_shards(images(6), tmp_path, "x", ShardSize(bytes=4096)))
    assert [scan.entry.samples for scan in scans] == [2, 2, 2]  # four blocks of 512 bytes a sample


def test_a_writer_that_fails_leaves_whole_shards_only(tmp_path: Path) -> None:
    def feed() -> Iterator[Encoded]:
        yield from images(5)
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        list(write_shards(feed(), tmp_path, "x", ShardSize(samples=2)))
    assert sorted(os.listdir(tmp_path)) == ["x-000000.idx.npy", "x-000000.tar", "x-000001.idx.npy", "x-000001.tar"]


def test_atomic_writer_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_writer(path) as file:
            file.write(b"ne")
            raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        fail()
    assert path.read_bytes() == b"old"
    with atomic_writer(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


PNG = encode_png(np.zeros((2, 2, 3), np.uint8))


def test_shards_of_others_can_be_indexed(tmp_path: Path) -> None:
    """GNU tar, folders in the names, long names, upper case, more members, another order."""
    long = "f/" + "n" * 120
    members = {
        "f/a.json": b"{}", "f/a.CLS": b"4\n", "f/a.PNG": PNG,
        f"{long}.png": PNG, f"{long}.cls": b"0",
        "b.jpeg": b"bytes", "b.cls": b" 11 ",
    }  # fmt: skip
    path = write_tar(tmp_path / "other.tar", members)
    scan = scan_shard(path)
    assert scan.index["label"].tolist() == [4, 0, 11]
    data = path.read_bytes()
    for row, names in zip(scan.index, [["f/a.json", "f/a.CLS", "f/a.PNG"], [f"{long}.png", f"{long}.cls"],
                                       ["b.jpeg", "b.cls"]], strict=True):  # fmt: skip
        span = data[int(row["offset"]) : int(row["offset"] + row["length"])]
        with tarfile.open(fileobj=io.BytesIO(span)) as archive:
            assert archive.getnames() == names


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": PNG}, "sample a: no label"),
        ({"a.cls": b"1"}, "sample a: no image"),
        ({"a.png": PNG, "a.cls": b"cat"}, "label b'cat'"),
        ({"a.png": PNG, "a.cls": b"-1"}, "label -1 is below 0"),
        ({"README": b"none"}, "holds no samples"),
        ({}, "holds no samples"),
    ],
)
def test_shards_without_what_is_needed_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        scan_shard(write_tar(tmp_path / "x.tar", members))


def test_what_is_no_plain_tar_is_refused(tmp_path: Path) -> None:
    packed = write_tar(tmp_path / "x.tar.gz", {"a.png": PNG, "a.cls": b"1"}, "w:gz")
    with pytest.raises(DataError, match="uncompressed"):
        scan_shard(packed)
    with pytest.raises(DataError, match="is not there"):
        scan_shard(tmp_path / "absent.tar")
    list(write_shards(images(4), tmp_path, "y", ShardSize(samples=9)))
    whole = (tmp_path / "y-000000.tar").read_bytes()
    for cut in (5000, 4 * 4 * 512 - 100):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar"):
            scan_shard(tmp_path / "cut.tar")


def test_a_foreign_index_is_refused(tmp_path: Path) -> None:
    (scan,) = write_shards(images(4), tmp_path, "x", ShardSize(samples=9))
    shard = tmp_path / scan.entry.file
    with pytest.raises(DataError, match="4 entries, 5 samples"):
        read_index(shard, 5)
    np.save(index_path(shard), np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read"):
        read_index(shard, 1)
    index_path(shard).unlink()
    with pytest.raises(DataError, match="prepare index"):
        read_index(shard, 4)


def test_folders_between_samples_belong_to_none(tmp_path: Path) -> None:
    """As plain `tar` packs a folder of folders."""
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            folder = tarfile.TarInfo(f"d{number}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, data in ((f"d{number}/a.cls", b"1"), (f"d{number}/a.jpg", b"x" * (700 * number))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    scan = scan_shard(path)
    data = path.read_bytes()
    assert scan.entry.sha256 == hashlib.sha256(data).hexdigest()
    for number, row in enumerate(scan.index):
        span = data[int(row["offset"]) : int(row["offset"] + row["length"])]
        assert zlib.crc32(span) == row["crc32"]
        with tarfile.open(fileobj=io.BytesIO(span)) as archive:
            assert archive.getnames() == [f"d{number}/a.cls", f"d{number}/a.jpg"]


@pytest.mark.parametrize(("key", "value"), [("length", 2**60), ("offset", 2**63), ("offset", 10**6)])
def test_an_index_that_points_outside_its_shard_is_refused(tmp_path: Path, key: str, value: int) -> None:
    (scan,) = write_shards(images(4), tmp_path, "x", ShardSize(samples=9))
    path = tmp_path / scan.entry.file
    read_index(path, 4, scan.entry.bytes)
    index = scan.index.copy()
    index[key][2] = value
    np.save(index_path(path), index)
    with pytest.raises(DataError, match="a sample ends past its"):
        read_index(path, 4, scan.entry.bytes)
