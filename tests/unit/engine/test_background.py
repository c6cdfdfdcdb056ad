"""Writing while training goes on: in order, errors raised later and not lost, copies that nothing changes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from vit_efficient.engine.background import Writer, snapshot
from vit_efficient.engine.checkpoint import AtomicCheckpointIO, read_checkpoint
from vit_efficient.errors import CheckpointError


def test_in_order_and_not_waited_for() -> None:
    writer, gate, done = Writer(asynchronous=True), threading.Event(), []
    writer.do(lambda: (gate.wait(20), done.append(1))[1])  # type: ignore[func-returns-value]
    writer.do(lambda: done.append(2))
    assert done == []
    writer.check()
    gate.set()
    writer.wait()
    assert done == [1, 2]


def test_at_once_by_default() -> None:
    done: list[int] = []
    Writer().do(lambda: done.append(1))
    assert done == [1]


def fail() -> None:
    raise CheckpointError("the disk is full")


def test_an_error_stops_what_follows_and_is_raised() -> None:
    """A checkpoint that could not be written gets no name, and the one before is not dropped for it."""
    writer, done = Writer(asynchronous=True), []
    writer.do(fail)
    writer.do(lambda: done.append(1))
    with pytest.raises(CheckpointError, match="disk is full"):
        writer.wait()
    assert done == []


def test_an_error_is_raised_at_the_next_step() -> None:
    writer, after = Writer(asynchronous=True), threading.Event()
    writer.do(fail)
    writer.do(after.set)  # not run
    while not writer._pending[0].done():
        after.wait(0.01)
    with pytest.raises(CheckpointError, match="disk is full"):
        writer.check()
    assert not after.is_set()


def test_what_is_written_is_the_state_of_that_moment(tmp_path: Path) -> None:
    writer, gate = Writer(asynchronous=True), threading.Event()
    io = AtomicCheckpointIO(writer)
    state = {"vit_efficient": {"history": [1]}, "w": torch.zeros(3)}
    writer.do(lambda: gate.wait(20) and None)  # type: ignore[func-returns-value]
    threading.Timer(0.2, gate.set).start()
    io.save_checkpoint(state, tmp_path / "step-00000001.ckpt")
    state["w"] += 1  # type: ignore[operator]
    state["vit_efficient"]["history"].append(2)  # type: ignore[index]
    writer.wait()
    saved = read_checkpoint(tmp_path / "step-00000001.ckpt")
    assert saved["vit_efficient"]["history"] == [1]
    assert torch.equal(saved["w"], torch.zeros(3))


def test_an_unwritable_folder_is_reported_later(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = Writer(asynchronous=True)
    AtomicCheckpointIO(writer).save_checkpoint({"w": torch.ones(1)}, tmp_path / "checkpoints" / "step-00000001.ckpt")
    with pytest.raises(CheckpointError, match="Cannot write the checkpoint"):
        writer.wait()


def test_snapshots_share_nothing() -> None:
    tree = {"a": [torch.zeros(2), {"b": 1}], "c": (torch.ones(1), "x")}
    copied = snapshot(tree)
    tree["a"][0] += 5  # type: ignore[operator]
    tree["a"][1]["b"] = 2  # type: ignore[index, call-overload]
    assert torch.equal(copied["a"][0], torch.zeros(2))
    assert copied["a"][1] == {"b": 1}
    assert copied["c"][1] == "x"
