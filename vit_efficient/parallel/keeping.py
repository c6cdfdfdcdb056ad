"""FSDP2 that gathers weights once a step where there is room: they stay gathered from forward to backward pass.

Gathering costs the host more than the link: for every parameter a view, a storage and an attribute, twice a step. Of 24
tiny blocks' forward and backward pass (one CPU process, collectives that do nothing) the host's time is 40 ms with two
blocks a unit, 32 with four, and 27 if those are gathered once; without sharding it is 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Keeping:
    """Forward pre-hook of a sharded model: a pass that a backward pass follows leaves its units gathered for it.

    Others let go at once, so that whoever changes parameters between two evaluations changes what is computed with.

    Args:
        units: a block of each unit.
    """

    def __init__(self, units: Sequence[FSDPModule]) -> None:
        self.units, self.keeps = units, False

    def __call__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        keeps = model.training and torch.is_grad_enabled()
        if keeps == self.keeps:
            return
        self.keeps = keeps
        for unit in self.units:
            unit.set_reshard_after_forward(not keeps, recurse=False)
            if not keeps:
                unit.reshard()
