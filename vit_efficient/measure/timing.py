"""How long calls take: several contenders in turn, round after round, so that what disturbs one disturbs all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of every timed call, round by round.

    Args:
        rounds: one sequence a round; no round is empty.
    """

    rounds: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> list[float]:
        """Of all rounds, the shortest first."""
        return sorted(second for seconds in self.rounds for second in seconds)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.calls)

    def percentile(self, percent: float) -> float:
        """The shortest time that at least `percent` of all calls keep within (nearest rank)."""
        calls = self.calls
        return calls[max(0, math.ceil(percent / 100 * len(calls)) - 1)]

    @property
    def medians(self) -> list[float]:
        """Of each round."""
        return [statistics.median(seconds) for seconds in self.rounds]

    @property
    def median(self) -> float:
        return statistics.median(self.calls)


def speedup(timing: Timing, baseline: Timing) -> tuple[float, float, float]:
    """How many times as fast as `baseline`: (median, lowest, highest) of the rounds' ratios.

    Both were timed in the same rounds, so a clock that sinks in one of them leaves its ratio alone.
    """
    ratios = [theirs / ours for ours, theirs in zip(timing.medians, baseline.medians, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def time_in_turn(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 5,
    seconds: float = 0.5,
    fewest: int = 3,
    most: int = 200,
    warmup: float = 0.5,
    before: Call | None = None,
) -> dict[str, Timing]:
    """Time contenders in turn.

    A GPU is timed by CUDA events around each call, a CPU by the clock. The number of calls in a round is the same in
    all rounds, and such that the round takes about `seconds`.

    Args:
        calls: by name; each does one unit of work on `device`.
        device: that they run on.
        rounds: how often each contender has its turn.
        seconds: of a turn, about.
        fewest: calls in a turn at least.
        most: calls in a turn at most.
        warmup: seconds that each contender is called for, at least twice, before anything is timed.
        before: called before every timed call and not timed; for example to flush a cache.
    """
    counts: dict[str, int] = {}
    for name, call in calls.items():
        call()  # compiles, allocates, chooses kernels
        _wait(device)
        began, done = time.perf_counter(), 0
        while done == 0 or (time.perf_counter() - began < warmup and done < most):
            call()
            _wait(device)
            done += 1
        each = (time.perf_counter() - began) / done
        counts[name] = min(most, max(fewest, round(seconds / each)))
    timed: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    timer = _events if device.type == "cuda" else _clock
    for number in range(rounds):
        names = list(calls)
        for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody always follows the same one
            timed[name].append(tuple(timer(calls[name], counts[name], before)))
    return {name: Timing(tuple(rounds_)) for name, rounds_ in timed.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clock(call: Call, count: int, before: Call | None) -> Sequence[float]:
    seconds = []
    for _ in range(count):
        if before is not None:
            before()
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def _events(call: Call, count: int, before: Call | None) -> Sequence[float]:
    call()  # the first after another contender finds caches and clocks as that one left them
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in pairs:
        if before is not None:
            before()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]
