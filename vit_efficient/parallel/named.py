"""Optimizer states by parameter name, so that they fit wherever the parameters do.

torch counts parameters in the order of an optimizer's groups, which is of no use to a run that resumes under another
strategy. Here a state is kept under its parameter's name, in the LightningModule's spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from vit_efficient.errors import CheckpointError


def names_of(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in its own order."""
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def by_name(state: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state dict with names in place of positions."""
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    return {**state, "state": {names[i]: value for i, value in state["state"].items()}, "param_groups": groups}


def by_position(saved: Mapping[str, Any], names: list[str], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state dict that an optimizer loads, of what `by_name` made, perhaps for an optimizer of other groups.

    Args:
        saved: states by name.
        names: of this optimizer's parameters, in its order.
        groups: this optimizer's own, as its `state_dict` has them.

    Raises:
        CheckpointError: the saved state is of other parameters.
    """
    rates = {name: group for group in saved["param_groups"] for name in group["params"]}
    if strangers := rates.keys() ^ set(names):
        raise CheckpointError(
            f"The checkpoint's optimizer trained other parameters than this run's: {', '.join(sorted(strangers)[:4])}"
            f"{' and more' if len(strangers) > 4 else ''}. Resume with the recipe in that run's folder."
        )
    position = {name: i for i, name in enumerate(names)}
    mine = [{**rates[names[group["params"][0]]], "params": group["params"]} for group in groups]
    return {**saved, "state": {position[name]: value for name, value in saved["state"].items()}, "param_groups": mine}


class NamedStates:
    """Mixed into a Lightning strategy, before it: optimizer states go into checkpoints, and come out, by name."""

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = super().optimizer_state(optimizer)  # type: ignore[misc]
        return by_name(state, names_of(optimizer, self.lightning_module))  # type: ignore[attr-defined]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = [
            by_position(saved, names_of(own, self.lightning_module), own.state_dict()["param_groups"])  # type: ignore[attr-defined]
            for own, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)  # type: ignore[attr-defined]
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})  # type: ignore[misc]
