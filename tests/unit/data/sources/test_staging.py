from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vit_efficient.data.sources.base import BadImage, RawImage, Subset
from vit_efficient.data.sources.staging import staged
from vit_efficient.errors import DataError


class Tape:
    """Numbers as images, which may only be scanned; image 5 has none, and a scan may end the process."""

    def __init__(self, count: int = 40, dies_at: int = -1, size: int = 1) -> None:
        self.labels = np.arange(count) % 4
        self.dies_at, self.size = dies_at, size
        self.volume = count * 3 * size
        self.scans = 0

    def name(self, index: int) -> str:
        return f"n{index}"

    def read(self, index: int) -> RawImage:
        raise AssertionError("one by one is what staging is there to avoid")

    def scan(self, chosen: NDArray[np.bool_]) -> Iterator[bytes | None]:
        self.scans += 1
        for number in np.flatnonzero(chosen).tolist():
            if number == self.dies_at:
                os._exit(9)  # as kill -9: nothing is cleaned up
            yield None if number == 5 else b"%d" % number * self.size

    def digest(self) -> str:
        return f"tape of {self.labels.size}"


def silent(done: int, total: int) -> None:
    """Nobody looks."""


def test_any_order_and_nothing_left(tmp_path: Path) -> None:
    tape, told = Tape(), []
    with staged(tape, tmp_path / "copy", lambda *what: told.append(what)) as split:
        assert told == [(done, 40) for done in range(1, 41)]
        split = pickle.loads(pickle.dumps(split))
        assert np.array_equal(split.labels, tape.labels)
        for index in np.random.default_rng(0).permutation(40).tolist():
            if index == 5:
                with pytest.raises(BadImage, match="has no image"):
                    split.read(index)
            else:
                assert split.read(index) == RawImage(f"n{index}", b"%d" % index)
    assert not any(tmp_path.iterdir())


def test_of_a_subset_only_its_images_are_copied(tmp_path: Path) -> None:
    chosen = np.asarray([2, 5, 17, 39])
    with staged(Subset(Tape(size=1000), chosen), tmp_path / "copy", silent) as split:
        assert split.labels.tolist() == [2, 1, 1, 3]
        assert [split.name(k) for k in range(4)] == ["n2", "n5", "n17", "n39"]
        assert split.read(3).data == b"39" * 1000
        assert sum(path.stat().st_size for path in (tmp_path / "copy").iterdir()) < 6000


def test_other_splits_are_as_they_were(tmp_path: Path) -> None:
    class Plain:
        labels = np.arange(3)

        def name(self, index: int) -> str:
            return str(index)

        def read(self, index: int) -> RawImage:
            return RawImage("", b"")

    for plain in (Plain(), Subset(Plain(), np.arange(2))):
        with staged(plain, tmp_path / "copy", silent) as split:
            assert split is plain
            assert not any(tmp_path.iterdir())


def test_a_whole_copy_is_used_again_after_a_failure(tmp_path: Path) -> None:
    tape = Tape()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), staged(tape, tmp_path / "copy", silent):
            raise KeyboardInterrupt
    with staged(tape, tmp_path / "copy", silent) as split:
        assert split.read(7).data == b"7"
        assert tape.scans == 1
    for other in (Tape(41), Subset(tape, np.arange(1, 30))):  # not of these images
        with pytest.raises(KeyboardInterrupt), staged(tape, tmp_path / "copy", silent):
            raise KeyboardInterrupt
        with staged(other, tmp_path / "copy", silent) as split:
            assert split.read(8).data == split.name(8)[1:].encode()


def _die(folder: Path) -> None:
    with staged(Tape(dies_at=30), folder, silent):
        raise AssertionError("it is dead by now")


def test_a_half_of_a_copy_is_made_again(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path / "copy",))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert any((tmp_path / "copy").iterdir())
    with staged(Tape(), tmp_path / "copy", silent) as split:
        assert split.read(39).data == b"39"
    assert not any(tmp_path.iterdir())


def test_room_is_looked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 2_000_000_000))
    tape = Tape()
    tape.volume = 8_000_000_000
    with pytest.raises(DataError, match=r"about 8\.0 GB, and has 2\.0 GB"), staged(tape, tmp_path / "copy", silent):
        raise AssertionError("there is no room")
    with staged(Subset(tape, np.arange(8)), tmp_path / "copy", silent) as split:  # a fifth of it
        assert split.read(3).data == b"3"


def _fill(folder: Path) -> None:
    """No file may grow past 20 kB, as if the disk were full; ends the process with 7 if that was explained."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        _ = staged(Tape(size=1000), folder, silent).__enter__()
    except DataError as error:
        os._exit(7 if "cannot be written: File too large" in str(error) else 8)


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path / "copy",))
    process.start()
    process.join()
    assert process.exitcode == 7
