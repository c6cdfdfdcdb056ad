from __future__ import annotations

import os
from pathlib import Path

import pytest

from vit_efficient.data.journal import NAME, Journal, open_journal
from vit_efficient.data.manifest import LeftOut, ShardEntry
from vit_efficient.errors import DataError

SETTINGS = {"seed": 3, "input": {"train": ["a.tar", 17]}}


def add(journal: Journal, position: int, *left_out: str) -> None:
    """A shard of a hundred bytes."""
    name = f"x-{len(journal.shards):06d}"
    (journal.path.parent / f"{name}.tar").write_bytes(bytes(100))
    (journal.path.parent / f"{name}.idx.npy").write_bytes(b"index")
    entry = ShardEntry(file=f"{name}.tar", samples=5, bytes=100, sha256="0" * 64)
    journal.add(entry, position, [LeftOut(name=one, reason="broken") for one in left_out])


def test_what_was_noted_is_read_again(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, SETTINGS)
    assert (journal.shards, journal.position, journal.left_out) == ([], 0, [])
    add(journal, 6, "a")
    add(journal, 13, "b", "ü\n")
    assert open_journal(tmp_path, SETTINGS) == journal
    assert [one.name for one in journal.left_out] == ["a", "b", "ü\n"]
    add(journal := open_journal(tmp_path, SETTINGS), 20)
    assert open_journal(tmp_path, SETTINGS) == journal
    assert journal.position == 20
    journal.remove()
    assert not (tmp_path / NAME).exists()


def test_cut_short_anywhere_it_says_what_was_whole(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, SETTINGS)
    path = tmp_path / NAME
    begun = path.stat().st_size
    add(journal, 6, "a")
    first = path.stat().st_size
    add(journal, 13, "b")
    text = path.read_bytes()
    for size in range(begun, len(text) + 1):
        path.write_bytes(text[:size])
        again = open_journal(tmp_path, SETTINGS)
        whole = (size >= first) + (size == len(text))
        assert len(again.shards) == len(again.left_out) == whole
        assert again.position == (0, 6, 13)[whole]
        assert path.stat().st_size == (begun, first, len(text))[whole]  # the next line begins where it should


def test_other_settings_are_named(tmp_path: Path) -> None:
    add(open_journal(tmp_path, SETTINGS), 6)
    with pytest.raises(DataError, match=r"unfinished run with other input or options \(fraction, seed\)"):
        open_journal(tmp_path, {"input": SETTINGS["input"], "seed": 4, "fraction": 0.1})


@pytest.mark.parametrize("damage", ["absent", "cut", "index"])
def test_shards_that_are_noted_must_be_there(tmp_path: Path, damage: str) -> None:
    add(open_journal(tmp_path, SETTINGS), 6)
    shard = tmp_path / "x-000000.tar"
    if damage == "cut":
        os.truncate(shard, 99)
    else:
        (shard if damage == "absent" else tmp_path / "x-000000.idx.npy").unlink()
    with pytest.raises(DataError, match=r"x-000000\.tar, which an unfinished run had written"):
        open_journal(tmp_path, SETTINGS)


def test_the_users_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        open_journal(tmp_path, SETTINGS)
    (tmp_path / "notes.txt").unlink()
    add(open_journal(tmp_path, SETTINGS), 6)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    open_journal(tmp_path, SETTINGS)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "folder").is_dir()
