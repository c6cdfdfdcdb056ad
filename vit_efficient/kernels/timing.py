"""How long work takes on a GPU: by events, with a cold cache, variants in turn, as medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

AHEAD = 2_000_000  # clock ticks, about a millisecond: longer than the host takes to prepare a launch
FLUSHED = 4  # times the size of the second-level cache is written between two measurements


@dataclass(frozen=True)
class Timed:
    """Milliseconds of repeated runs.

    Args:
        median: of all.
        low: the 10th percentile.
        high: the 90th.
    """

    median: float
    low: float
    high: float


def time_in_turn(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, repetitions: int = 20, warm_up: int = 3
) -> dict[str, Timed]:
    """Time each variant `repetitions` times, one after the other in every round, so that drifts meet all alike.

    Before each measurement the cache is filled with other data, and the device waits for about a millisecond, in which
    the host prepares the launch: so the time of a launch does not count.
    """
    flush = torch.empty(FLUSHED * _cache_bytes(device), dtype=torch.int8, device=device)
    for work in variants.values():
        for _ in range(warm_up):
            work()
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, work in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(AHEAD)
            start.record()
            work()
            end.record()
            pairs[name].append((start, end))
        torch.cuda.synchronize(device)
    return {name: summary([a.elapsed_time(b) for a, b in events]) for name, events in pairs.items()}


def summary(milliseconds: list[float]) -> Timed:
    """Median and spread."""
    ordered = sorted(milliseconds)
    tenth = len(ordered) // 10
    return Timed(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth])


def _cache_bytes(device: torch.device) -> int:
    return max(2**26, torch.cuda.get_device_properties(device).L2_cache_size)
