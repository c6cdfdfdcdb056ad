"""Replacing modules of a model in place."""

from __future__ import annotations

from torch import nn


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in `model`. Hooks of the old module do not move: replace before adding any."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
