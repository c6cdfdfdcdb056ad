"""Rows of `benchmark training`: rates, what they are held against, and the table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vit_efficient.measure.training_rows import GIB, TrainingRow, first_that_ran, print_rows

ONE = TrainingRow("one", "single", 1, 100, 100, rounds=((0.1, 0.1, 0.4), (0.2, 0.2, 0.2)), loss=1.0)
TWO = TrainingRow(
    "two", "ddp on 2", 2, 100, 50, rounds=((0.2, 0.2, 0.2), (0.25, 0.2, 0.3)), loss=1.0, peak=3 * GIB,
    reserved=4 * GIB, estimated=2 * GIB, predicted=700.0,
)  # fmt: skip
LOST = TrainingRow("lost", "fsdp on 2", 2, 100, 100, failed="OutOfMemoryError: all of it")


def test_rates_are_of_medians() -> None:
    assert ONE.medians == [0.1, 0.2]
    assert ONE.seconds == 0.2
    assert ONE.each == 500
    assert TWO.each == 500
    assert TWO.against(ONE) == (pytest.approx(0.65), pytest.approx(0.5), pytest.approx(0.8))
    assert ONE.against(ONE) == (1, 1, 1)


def test_batches_may_differ() -> None:
    """A device with twice the images in twice the time is as fast."""
    double = TrainingRow("double", "single", 1, 200, 200, rounds=((0.2,), (0.4,)))
    assert double.against(ONE) == (1, 1, 1)


def test_the_first_that_ran_is_what_others_are_held_against() -> None:
    assert first_that_ran([LOST, TWO, ONE], 100) is TWO
    assert first_that_ran([LOST], 100) is None
    assert first_that_ran([ONE], 7) is None


def test_plain_values() -> None:
    plain = TWO.plain(ONE)
    assert (plain["images_per_second_each"], plain["images_per_second"]) == (500, 1000)
    assert plain["relative"] == pytest.approx(0.65)
    assert plain["relative_range"] == [pytest.approx(0.5), pytest.approx(0.8)]
    assert "seconds" not in LOST.plain(ONE)
    waiting = TrainingRow("later", "single", 1, 100, 100)
    assert "seconds" not in waiting.plain(ONE), "not run yet"
    assert first_that_ran([waiting, ONE], 100) is ONE
    once = TrainingRow("once", "single", 1, 100, 100, rounds=((0.1,),))
    assert once.plain(ONE)["relative"] == 1, "of the rounds that both have had"
    assert LOST.plain(None)["failed"].startswith("OutOfMemoryError")


def test_the_table() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_rows(console, [ONE, TWO, LOST], "a model")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    head, *lines = text.strip().splitlines()
    assert head == "a model, 100 images a device in a step"
    assert lines[2].split() == ["500", "500", "1.000", "1.000-1.000", "200.0", "-", "-", "-"]
    assert lines[4].split() == ["1,000", "500", "0.650", "0.500-0.800", "200.0", "700", "3.0", "2.0"]
    assert lines[6] == "  failed: OutOfMemoryError: all of it"
    assert "over one's: median and range over 2 runs" in text
    assert max(len(line) for line in lines[:7]) <= 80
