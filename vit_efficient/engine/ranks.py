"""What the processes of a run know together."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_over_ranks(value: T) -> list[T]:
    """Every process's value, by rank; all of them must ask for it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(count: int) -> int:
    """The sum over all processes; all of them must ask for it."""
    return sum(gather_over_ranks(count))
