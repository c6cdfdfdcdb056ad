from __future__ import annotations

import os
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from vit_efficient.data.reader import ShardReader
from vit_efficient.data.samples import BadSample
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import Encoded
from vit_efficient.data.shards import read_index
from vit_efficient.errors import DataError

Make = Callable[..., ShardSet]


def test_reads_any_sample_with_few_files_open(make_shards: Make) -> None:
    counts = [3, 2, 4]
    with ShardReader(make_shards(counts), 3, open_files=2) as reader:
        first = np.cumsum([0, *counts])
        before = len(os.listdir("/proc/self/fd"))
        for shard, index in [(2, 3), (0, 1), (1, 0), (2, 0), (0, 2), (0, 0)]:
            number = first[shard] + index
            sample = reader.read(shard, index)
            assert (sample.key, sample.label) == (f"{number:05d}", number % 3)
        assert len(os.listdir("/proc/self/fd")) - before <= 2 * 2  # each shard and its index
    assert len(os.listdir("/proc/self/fd")) == before


def test_travels_to_another_process_without_its_files(make_shards: Make) -> None:
    with ShardReader(make_shards([3]), 3) as reader:
        reader.read(0, 0)
        copy = pickle.loads(pickle.dumps(reader))
        with copy:
            assert copy.read(0, 2) == reader.read(0, 2)


def test_an_altered_byte_is_caught_and_named(make_shards: Make) -> None:
    shards = make_shards([3])
    row = read_index(shards.path(0), 3)[1]
    with open(shards.path(0), "r+b") as file:
        file.seek(int(row["offset"] + row["length"]) - 300)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with ShardReader(shards, 3) as reader:
        assert reader.read(0, 0).key == "00000"
        assert reader.read(0, 2).key == "00002"
        with pytest.raises(BadSample, match=r"part0-000000\.tar, sample 00001 .*checksum"):
            reader.read(0, 1)


def test_a_truncated_shard_is_caught_at_the_first_sample_past_its_end(make_shards: Make) -> None:
    shards = make_shards([3])
    with ShardReader(shards, 3) as reader:
        reader.read(0, 0)
        os.truncate(shards.path(0), 3000)  # while it is open
        with pytest.raises(DataError, match="truncated: sample number 2"):
            reader.read(0, 2)
    with ShardReader(shards, 3) as reader:
        assert reader.read(0, 0).key == "00000"  # what is whole can be read
        with pytest.raises(BadSample, match="truncated: sample number 2"):
            reader.read(0, 2)
    shards.path(0).unlink()
    with ShardReader(shards, 3) as reader, pytest.raises(DataError, match="cannot be opened"):
        reader.read(0, 0)


def test_a_label_out_of_range_names_shard_and_sample(make_shards: Make) -> None:
    with ShardReader(make_shards([3]), 2) as reader:
        reader.read(0, 1)
        with pytest.raises(DataError, match=r"part0-000000\.tar, sample 00002: label 2 is out of range.*2 classes"):
            reader.read(0, 2)


def test_bytes_come_back_as_they_went_in(make_shards: Make) -> None:
    given = [Encoded("k", os.urandom(size), "jpg", 0) for size in (0, 1, 511, 512, 100_000)]
    given = [Encoded(f"k{i}", one.image, one.extension, one.label) for i, one in enumerate(given)]
    with ShardReader(make_shards([5], samples=given), 3) as reader:
        assert [reader.read(0, i).image for i in range(5)] == [one.image for one in given]
