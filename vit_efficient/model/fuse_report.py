"""What fusing the blocks of a model did, in words."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class FuseReport:
    """What `fuse_blocks` did.

    Args:
        fused: names of the blocks that are fused.
        left: why each of the others is not, by its name.
        passes: by a fused block's name, the layers whose input is quantized in a pass of its own, and why.
    """

    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    passes: dict[str, dict[str, str]] = field(default_factory=dict)

    def count(self) -> str:
        """``24 of 24 blocks fused``."""
        return f"{len(self.fused)} of {len(self.fused) + len(self.left)} blocks fused"

    def reasons(self) -> list[str]:
        """A line for each reason why blocks are not fused."""
        return [f"not fused: {names}: {reason}" for reason, names in _grouped(self.left.items())]

    def apart(self) -> list[str]:
        """A line for each layer and reason why its input is not quantized by the kernel that makes it."""
        found = _grouped((name, reason) for name, layers in self.passes.items() for reason in layers.items())
        return [f"quantized apart: input of {layer} in {names}: {why}" for (layer, why), names in found]

    def lines(self) -> list[str]:
        """For a person to read."""
        return [self.count(), *self.reasons(), *self.apart()]


def _grouped(pairs: Iterable[tuple[str, Key]]) -> list[tuple[Key, str]]:
    """Blocks by what they have in common, and these blocks in words."""
    together: dict[Key, list[str]] = {}
    for name, key in pairs:
        together.setdefault(key, []).append(name)
    return [(key, _span(names)) for key, names in together.items()]


def _span(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} .. {names[-1]} ({len(names)})"
