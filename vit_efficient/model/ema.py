"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.errors import CheckpointError
from vit_efficient.parallel.full import copy, joined, kept, local, spread


class WeightAverage:
    """A float32 moving average of a model's trainable parameters: ``a <- d a + (1 - d) w`` after every step.

    The decay ``d`` rises as ``min(decay, (1 + t) / (10 + t))``, so that short runs are not dominated by the initial
    weights. Frozen parameters (a QLoRA base) take no memory here.

    Args:
        model: the model whose trainable parameters are averaged.
        decay: the final decay, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average: dict[str, Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """Begin with the parameters as they are; to be called again once a strategy has cut them up."""
        self._average = {name: kept(p).clone().float() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        weights = [local(kept(p)).float() for p in self._live.values()]
        torch._foreach_lerp_([local(a) for a in self._average.values()], weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model holds the averaged weights; afterwards its own, bit for bit."""
        own = {name: kept(p).clone() for name, p in self._live.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(own)

    def copy_to_model(self) -> None:
        """Put the averaged weights into the model, for good."""
        self._copy(self._average)

    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            copy(parameter, source[name])

    def state_dict(self) -> dict[str, Any]:
        average = {name: joined(a, self._live[name]) for name, a in self._average.items()}
        return {"steps": self.steps, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if missing := self._average.keys() ^ state["average"].keys():
            raise CheckpointError(f"The moving average of the checkpoint has other weights: {sorted(missing)[:5]}")
        self.steps = state["steps"]
        for name, tensor in self._average.items():
            copy(tensor, spread(state["average"][name], self._live[name]))
