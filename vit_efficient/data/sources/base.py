"""What a source of images offers: numbered images, read in any order, with labels known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.counter import Domain, permutation

Labels = NDArray[np.int64]


class BadImage(ValueError):  # noqa: N818 - named for the thing
    """An image of the source that cannot go into a shard; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """What the command line names.

    Args:
        path: the one folder or archive of most sources.
        train: training archive, where a source has one for itself.
        val: validation archives, likewise.
    """

    path: Path | None = None
    train: Path | None = None
    val: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RawImage:
    """An encoded image; `name` tells where it came from, `extension` has no dot."""

    name: str
    data: bytes
    extension: str


class Split(Protocol):
    """Images 0 to len(labels) - 1."""

    labels: Labels

    def name(self, index: int) -> str:
        """For messages, and part of the sample's key."""

    def read(self, index: int) -> RawImage:
        """One image.

        Raises:
            BadImage: it cannot be used.
        """


@dataclass(frozen=True)
class Source:
    """A data set, opened.

    Args:
        name: of the source, as in a recipe.
        class_names: by label.
        splits: `train`, and `val` where the source has one of its own.
        identity: what tells this input from another one; JSON, small.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    identity: dict[str, Any]


class Subset:
    """Some images of a split."""

    def __init__(self, split: Split, indices: Labels) -> None:
        self.split, self.indices = split, indices
        self.labels = split.labels[indices]

    def name(self, index: int) -> str:
        return self.split.name(int(self.indices[index]))

    def read(self, index: int) -> RawImage:
        return self.split.read(int(self.indices[index]))


def stratified(labels: Labels, count: int, seed: int) -> tuple[Labels, Labels]:
    """Set `count` images aside, each class giving its share (largest remainders first; never its last image).

    Returns:
        indices that stay, and indices set aside, both ascending.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / labels.size)
    most = sizes - 1
    shares = np.minimum(np.floor(exact).astype(np.int64), most)
    for _ in range(min(count, int(most.sum())) - int(shares.sum())):
        shares[np.argmax(np.where(shares < most, exact - shares, -np.inf))] += 1
    aside = []
    for label, share in zip(classes.tolist(), shares.tolist(), strict=True):
        members = np.flatnonzero(labels == label)
        aside.append(members[permutation(members.size, Domain.SPLIT, seed, label)[:share]])
    chosen = np.sort(np.concatenate(aside))
    return np.setdiff1d(np.arange(labels.size), chosen), chosen
