"""Replacing modules of a model in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in `model`. Hooks of the old module do not move: replace before adding any."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """`model` with other modules in the named places, and its own ones back again afterwards, whatever happens."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            replace(model, name, module)
        yield model
    finally:
        for name, module in reversed(own.items()):
            replace(model, name, module)
