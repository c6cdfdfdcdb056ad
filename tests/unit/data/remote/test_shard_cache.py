"""The cache of whole shards: one download for all, a limit that holds, and nothing that a killed process leaves."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vit_efficient.data.reader import ShardReader
from vit_efficient.data.remote.config import RemoteConfig, parse_bytes
from vit_efficient.data.remote.shard_cache import ShardCache
from vit_efficient.data.resolve import open_shards
from vit_efficient.data.samples import BadSample
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shards import read_index
from vit_efficient.errors import DataError

pytestmark = pytest.mark.timeout(60)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def cached(make_shards: Callable[..., ShardSet], server: Any, tmp_path: Path) -> Callable[..., ShardSet]:
    """Shards of five samples each behind a server, with a cache."""
    make_shards([5, 5, 5, 5])

    def open_set(limit: str = "1GB", timeout: float = 5.0) -> ShardSet:
        config = RemoteConfig(timeout=timeout, attempts=3, cache=tmp_path / "cache", cache_size=limit)
        return open_shards(f"{server.url}/train", "data.shards", "train", config)

    return open_set


def shard(number: int) -> str:
    return f"train/part{number}-000000.tar"


def kept(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".tar", ".partial", ".damaged"))


def read_all(shards: ShardSet) -> list[str]:
    with ShardReader(shards, 3) as reader:
        numbers = range(len(shards.manifest.shards))
        return [reader.read(number, index).key for number in numbers for index in range(5)]


ALL = [f"{number:05d}" for number in range(20)]


def test_a_shard_is_downloaded_once(cached: Callable[..., ShardSet], server: Any, tmp_path: Path) -> None:
    for _ in range(3):
        assert read_all(cached()) == ALL
    assert [server.count(shard(number)) for number in range(4)] == [1] * 4
    assert kept(tmp_path / "cache") == {entry.sha256 for entry in cached().manifest.shards}
    assert not list((tmp_path / "cache").glob("*.partial"))


def _read(shards: ShardSet, queue: Any) -> None:
    queue.put(read_all(shards))


def test_processes_share_one_download(cached: Callable[..., ShardSet], server: Any) -> None:
    shards, queue = cached(), FORK.Queue()
    workers = [FORK.Process(target=_read, args=(shards, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=30) for _ in workers] == [ALL] * 4
    for worker in workers:
        worker.join()
    assert [server.count(shard(number)) for number in range(4)] == [1] * 4


def test_the_limit_holds_and_the_oldest_goes_first(
    cached: Callable[..., ShardSet], server: Any, tmp_path: Path
) -> None:
    entries = cached().manifest.shards
    limit = entries[0].bytes + entries[1].bytes + entries[2].bytes + 10  # one fewer than there are
    shards = cached(str(limit))
    with ShardReader(shards, 3, open_files=1) as reader:
        for number in (0, 1, 2):
            reader.read(number, 0)
        time.sleep(0.02)
        reader.read(0, 0)  # so that 1 has been unused for longest
        reader.read(3, 0)
        assert used(tmp_path / "cache") <= limit
        assert kept(tmp_path / "cache") == {entries[number].sha256 for number in (0, 2, 3)}
        reader.read(1, 4)
    assert server.count(shard(1)) == 2


def test_what_is_open_is_not_thrown_out(
    cached: Callable[..., ShardSet], server: Any, tmp_path: Path, caplog: Any
) -> None:
    """A file without a name would still fill the disk. What finds no room is read sample by sample."""
    entries = cached().manifest.shards
    shards = cached(str(max(entry.bytes for entry in entries)))  # room for one
    with ShardReader(shards, 3, open_files=8) as reader:
        keys = [reader.read(number, index).key for index in range(5) for number in range(4)]
        assert sorted(keys) == ALL
        assert kept(tmp_path / "cache") == {entries[0].sha256}
        assert [server.count(shard(number)) for number in range(4)] == [1, 5, 5, 5]
    assert caplog.text.count("has no room") == 1  # and not for each of them
    with ShardReader(shards, 3) as reader:
        reader.read(1, 0)  # nobody has the first one open any more
    assert kept(tmp_path / "cache") == {entries[1].sha256}


def test_what_somebody_removes_stays_readable_to_whoever_has_it_open(
    cached: Callable[..., ShardSet], server: Any, tmp_path: Path
) -> None:
    with ShardReader(cached(), 3) as reader:
        reader.read(0, 0)
        for path in (tmp_path / "cache").glob("*.tar"):
            path.unlink()
        assert [reader.read(0, index).key for index in range(5)] == ALL[:5]
    assert server.count(shard(0)) == 1


def test_a_server_without_parts_serves_a_cache(cached: Callable[..., ShardSet], server: Any, tmp_path: Path) -> None:
    server.always = {shard(number): "no ranges" for number in range(4)}
    server.faults[shard(0)] = ["no ranges", "drop"]
    assert read_all(cached()) == ALL
    before = len(server.requests)
    assert read_all(cached()) == ALL
    assert not any(file.endswith(".tar") for _, file, _ in server.requests[before:])
    shards = cached(str(max(entry.bytes for entry in cached().manifest.shards)))
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    with ShardReader(shards, 3) as reader, pytest.raises(DataError, match=r"part\d.*whole files only.*cache_size"):
        [reader.read(number, 0) for number in range(4)]  # there is no room for two, and no other way


def test_an_altered_shard_is_downloaded_once_a_run(
    cached: Callable[..., ShardSet], server: Any, tmp_path: Path, caplog: Any
) -> None:
    path = server.folder / shard(1)
    good = path.read_bytes()
    row = read_index(path, 5)[2]
    bad = bytearray(good)
    bad[int(row["offset"] + row["length"]) - 600] ^= 1
    path.write_bytes(bad)
    cached().check()
    for _ in range(2):  # as two processes would
        with ShardReader(cached(), 3) as reader:
            with pytest.raises(BadSample, match=r"http://.*/train/part1-000000\.tar, sample 00007 .*checksum"):
                reader.read(1, 2)
            assert reader.read(1, 3).key == "00008"
    assert server.count(shard(1)) == 1
    assert caplog.text.count("part1-000000.tar is not the shard of the manifest") == 1
    path.write_bytes(good)
    cached().check()  # the next run begins
    assert read_all(cached()) == ALL
    assert server.count(shard(1)) == 2
    assert not list((tmp_path / "cache").glob("*.damaged"))


def test_a_shard_that_the_disk_has_spoilt(cached: Callable[..., ShardSet], server: Any, tmp_path: Path) -> None:
    read_all(cached())
    entry = cached().manifest.shards[1]
    path = tmp_path / "cache" / f"{entry.sha256}.tar"
    os.truncate(path, 3000)
    assert read_all(cached()) == ALL
    assert server.count(shard(1)) == 2
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadSample, match=rf"part1-000000\.tar \(kept as {path}\), sample 00005 .*checksum"):
        read_all(cached())


def test_a_folder_without_locks_or_room_is_an_error(
    cached: Callable[..., ShardSet], server: Any, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").mkdir()  # stands in for a file system that refuses the lock
    with pytest.raises(DataError, match=r"data\.remote\.cache=.* cannot be used: .*local disk"):
        cached().check()


def test_a_limit_below_one_shard_is_an_error_at_the_start(cached: Callable[..., ShardSet]) -> None:
    with pytest.raises(DataError, match=r"cache_size of 1e-06 GB is less than one shard"):
        cached("1kB").check()
    cached("1GB").check()


def _stuck(shards: ShardSet) -> None:
    read_all(shards)


def test_a_killed_download_blocks_nobody(cached: Callable[..., ShardSet], server: Any, tmp_path: Path) -> None:
    server.faults[shard(0)] = ["stall"]
    worker = FORK.Process(target=_stuck, args=(cached(timeout=20),))
    worker.start()
    deadline = time.monotonic() + 10
    while not list((tmp_path / "cache").glob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    (left,) = (tmp_path / "cache").glob("*.partial")
    assert read_all(cached()) == ALL
    assert not left.exists()
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_leftovers_of_the_killed_are_swept_up(cached: Callable[..., ShardSet], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{'0' * 64}.partial").write_bytes(b"x" * 100_000)
    assert read_all(cached()) == ALL
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_where_there_is_no_room_it_is_read_without(
    cached: Callable[..., ShardSet], server: Any, tmp_path: Path, caplog: Any
) -> None:
    """Somebody downloads all that the cache may hold; this process neither waits nor breaks the limit."""
    entries = cached().manifest.shards
    limit = max(entry.bytes for entry in entries)
    server.faults[shard(0)] = ["stall"]
    worker = FORK.Process(target=_stuck, args=(cached(str(limit), timeout=20),))
    worker.start()
    while not list((tmp_path / "cache").glob("*.partial")):
        time.sleep(0.01)
    with ShardReader(cached(str(limit)), 3) as reader:
        assert reader.read(1, 2).key == "00007"
    assert "no room" in caplog.text
    assert used(tmp_path / "cache") <= limit
    worker.kill()
    worker.join()


def test_a_folder_that_cannot_be_made(cached: Callable[..., ShardSet], server: Any) -> None:
    config = RemoteConfig(cache=Path("/proc/nothing"))
    with pytest.raises(DataError, match="cannot be made"):
        open_shards(f"{server.url}/train", "data.shards", "train", config).check()


@pytest.mark.parametrize(
    ("text", "size"),
    [("5000", 5000), ("100GB", 10**11), ("1.5 TB", 15 * 10**11), ("2GiB", 2**31), ("1kB", 1000), ("7B", 7),
     ("", None), ("0", None), ("GB", None), ("5 parsec", None), ("-1GB", None)],
)  # fmt: skip
def test_sizes(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size
    if size is None:
        with pytest.raises(ValueError, match="must be a size such as"):
            RemoteConfig(cache_size=text)


def test_the_cache_knows_contents_not_places(cached: Callable[..., ShardSet], server: Any, tmp_path: Path) -> None:
    read_all(cached())
    before = server.count(shard(0))
    cache = ShardCache(tmp_path / "cache", 10**9)
    shards = cached()
    elsewhere = open_shards(f"{server.url}/train/../train", "data.shards", "train", RemoteConfig())
    found = cache.open(elsewhere.folder, shards.manifest.shards[0])  # type: ignore[arg-type]
    assert found is not None
    os.close(found.descriptor)
    assert server.count(shard(0)) == before
