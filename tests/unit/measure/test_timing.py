"""Timing in turn: real calls that really take their time."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from vit_efficient.measure.timing import Timing, speedup, time_in_turn

CPU = torch.device("cpu")


def test_percentiles_are_nearest_ranks() -> None:
    timing = Timing((tuple(range(1, 51)), tuple(range(51, 101))))
    assert [timing.percentile(p) for p in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert timing.mean == timing.median == 50.5
    assert timing.medians == [25.5, 75.5]
    assert Timing(((3.0,),)).percentile(99) == 3.0


def test_a_ratio_is_taken_round_by_round() -> None:
    """The machine is half as fast in the second round: both are, and their ratio is what it was."""
    ours, theirs = Timing(((1.0,), (2.0,), (1.0,))), Timing(((3.0,), (6.0,), (3.3,)))
    assert speedup(ours, theirs) == pytest.approx((3.0, 3.0, 3.3))


def test_contenders_take_turns() -> None:
    order: list[str] = []
    flushed: list[int] = []

    def call(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    calls = {"slow": call("slow", 0.02), "fast": call("fast", 0.002)}
    timed = time_in_turn(
        calls, CPU, rounds=3, seconds=0.06, fewest=2, warmup=0.02, before=lambda: flushed.append(len(order))
    )
    assert {name: len(timing.rounds) for name, timing in timed.items()} == {"slow": 3, "fast": 3}
    counts = {name: {len(seconds) for seconds in timing.rounds} for name, timing in timed.items()}
    assert all(len(each) == 1 for each in counts.values()), "as many calls in every round"
    assert len(flushed) == sum(len(timing.calls) for timing in timed.values())
    turns = order[flushed[0] :]
    assert sum(a != b for a, b in itertools.pairwise(turns)) >= 3, "one after the other, round by round"
    assert timed["slow"].percentile(1) >= 0.02
    assert timed["fast"].median < timed["slow"].median
    ratio, low, high = speedup(timed["fast"], timed["slow"])
    assert low <= ratio <= high
    assert ratio > 1.5
