"""Whatever is altered in a folder of shards is found, and named."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vit_efficient.data.encode import encode_png
from vit_efficient.data.indexing import index_pattern
from vit_efficient.data.preparation import silent
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import Encoded
from vit_efficient.data.shards import index_path, read_index
from vit_efficient.data.verify import verify_folder
from vit_efficient.errors import DataError

PNG = encode_png(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))


def faults(folder: Path, processes: int = 1, *, decode: bool = True) -> list[str]:
    return [fault.removeprefix(f"{folder}/") for fault in verify_folder(folder, silent, processes, decode=decode)]


@pytest.fixture
def folder(make_shards: Callable[..., ShardSet]) -> Path:
    """Shards of 5, 3 and 4 samples."""
    made = make_shards([5, 3, 4]).folder
    assert isinstance(made, Path)
    return made


def shard(folder: Path, number: int) -> Path:
    return folder / f"part{number}-000000.tar"


def edit_index(path: Path, change: Callable[[np.ndarray], object]) -> None:
    index = np.array(read_index(path, np.load(index_path(path)).size))
    change(index)
    np.save(index_path(path), index)


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_whole_has_no_faults(folder: Path, processes: int) -> None:
    told: list[tuple[str, int, int, int]] = []

    def progress(part: str, done: int, total: int, volume: int = 0) -> None:
        told.append((part, done, total, volume))

    assert not list(verify_folder(folder, progress, processes))
    size = sum(shard(folder, number).stat().st_size for number in range(3))
    assert [what[:3] for what in told] == [("train", done, 3) for done in range(4)]
    assert told[-1][3] == size


def test_every_byte_of_a_shard_counts(folder: Path) -> None:
    """Wherever a bit is flipped, the shard is named, and the sample too unless it is the padding at the end."""
    path = shard(folder, 1)
    whole = path.read_bytes()
    index = read_index(path, 3)
    rng = np.random.default_rng(0)
    for place in [0, len(whole) - 1, *rng.integers(0, len(whole), 40).tolist()]:
        altered = bytearray(whole)
        altered[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        found = faults(folder)
        assert found[0] == f"{path.name}: its sha256 is not the manifest's"
        number = int(np.searchsorted(index["offset"], place, side="right")) - 1
        if place < int(index["offset"][-1] + index["length"][-1]):
            assert len(found) >= 2
            assert re.search(rf"number {number}\b", found[1]), found
        assert all(fault.startswith(path.name) for fault in found if "samples have the key" not in fault)
    path.write_bytes(whole)
    assert not faults(folder)


def test_every_byte_of_an_index_counts(folder: Path) -> None:
    """But for those of its header that mean the same; and whatever it says, nothing crashes and nothing is huge."""
    path = index_path(shard(folder, 1))
    whole = path.read_bytes()
    start = len(whole) - 3 * read_index(shard(folder, 1), 3).itemsize
    for place in range(len(whole)):
        for value in {whole[place] ^ 1, 0, 255, 0x28} - {whole[place]}:
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            found = faults(folder, decode=False)
            assert found or place < start, (place, value)
    path.write_bytes(whole)
    assert not faults(folder)


def test_files_that_are_absent_cut_or_too_many(folder: Path) -> None:
    shard(folder, 0).unlink()
    os.truncate(shard(folder, 1), 2500)
    index_path(shard(folder, 2)).unlink()
    (folder / "other-000000.tar").write_bytes(b"")
    found = "\n".join(faults(folder, 2))
    for said in (
        r"part0-000000\.tar: not there",
        r"part1-000000\.tar: 2,500 bytes, [\d,]+ in the manifest",
        r"part1-000000\.tar: sample number 1 ends at byte [\d,]+, says the index, behind the shard's end",
        r"part2-000000\.tar: The offset index .* is not there",
        r"other-000000\.tar: not in the manifest",
        r"class a has 1 samples, 4 in the manifest",
    ):
        assert re.search(said, found), (said, found)


def test_an_index_that_skips_bytes_or_names_others(folder: Path) -> None:
    def shift(index: np.ndarray) -> None:
        index["offset"][1] += 512
        index["length"][1] -= 512

    edit_index(shard(folder, 0), shift)
    edit_index(shard(folder, 1), lambda index: index["label"].__setitem__(0, 1))
    edit_index(shard(folder, 2), lambda index: index["label"].__setitem__(0, 4_000_000_000))
    found = "\n".join(faults(folder))
    for said in (
        r"part0.*sample number 1 begins at byte [\d,]+, says the index, and not at",
        r"part1.*sample 00005 \(number 0\): label 2, 1 in the index",
        r"part2.*sample 00008 \(number 0\): label 2, 4000000000 in the index",
    ):
        assert re.search(said, found), (said, found)


def test_labels_counts_and_class_names_of_the_manifest(folder: Path) -> None:
    edit_manifest(folder, lambda raw: raw.update(class_counts=[4, 5, 3]))
    assert faults(folder) == [
        f"{folder}: class b has 4 samples, 5 in the manifest",
        f"{folder}: class c has 4 samples, 3 in the manifest",
    ]
    edit_manifest(folder, lambda raw: raw.update(class_names=["a", "b"], class_counts=[4, 4]))
    found = faults(folder)
    assert len(found) == 4
    assert all("label 2 is out of range; there are 2 classes" in fault for fault in found)


def test_an_image_that_does_not_decode_and_a_key_that_occurs_twice(make_shards: Callable[..., ShardSet]) -> None:
    given = [Encoded("same", PNG, "png", 0), Encoded("cut", PNG[:-30], "png", 1), Encoded("same", PNG, "png", 2)]
    folder = make_shards([2, 1], samples=given).folder
    assert isinstance(folder, Path)
    assert [re.sub(r"decoded: .*", "", fault) for fault in faults(folder)] == [
        "part0-000000.tar: sample cut (number 1): the image cannot be ",
        f"{folder}: 1 samples have the key of another one",
    ]
    assert faults(folder, decode=False) == [f"{folder}: 1 samples have the key of another one"]


def test_of_many_faults_of_one_shard_some_are_named(make_shards: Callable[..., ShardSet]) -> None:
    given = [Encoded(f"{number:02d}", PNG[:20], "png", 0) for number in range(30)]
    folder = make_shards([30], samples=given).folder
    assert isinstance(folder, Path)
    found = faults(folder)
    assert len(found) == 21
    assert found[-1] == "part0-000000.tar: and 10 faults more"


def test_shards_of_others_are_checked_too(folder: Path) -> None:
    for path in [*folder.glob("*.npy"), folder / "manifest.json"]:
        path.unlink()
    index_pattern(f"{folder}/part{{0..2}}-000000.tar", ("a", "b", "c"))
    assert not faults(folder)


def test_what_is_not_finished_is_said_to_be_so(folder: Path, tmp_path: Path) -> None:
    (folder / ".unfinished").write_bytes(b"")
    assert not faults(folder)  # killed as the very last thing: complete
    (folder / "manifest.json").unlink()
    (only,) = faults(folder)
    assert "not finished" in only
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(DataError, match=r"no manifest\.json"):
        faults(folder)


def test_a_process_that_is_killed_is_an_error(folder: Path) -> None:
    os.remove(shard(folder, 0))
    os.mkfifo(shard(folder, 0))  # reading it waits for ever

    def kill(part: str, done: int, total: int, volume: int = 0) -> None:
        if done == 2:  # of the two that can be read
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(DataError, match="was killed, perhaps for want of memory"):
        list(verify_folder(folder, kill, 2))
