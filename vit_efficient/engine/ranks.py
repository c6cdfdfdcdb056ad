"""What the processes of a run know together."""

from __future__ import annotations

import torch.distributed as dist


def sum_over_ranks(count: int) -> int:
    """The sum over all processes; all of them must ask for it."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    counts = [0] * dist.get_world_size()
    dist.all_gather_object(counts, count)
    return sum(counts)
