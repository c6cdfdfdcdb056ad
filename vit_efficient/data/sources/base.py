"""What a source of images offers: numbered images, read in any order, with labels known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.counter import Domain, permutation
from vit_efficient.errors import DataError

Labels = NDArray[np.int64]


class BadImage(ValueError):  # noqa: N818 - named for the thing
    """An image of the source that cannot go into a shard; the message says why."""


@dataclass(frozen=True)
class Inputs:
    """What the command line names.

    Args:
        path: the one folder, archive or file of most sources.
        train: training archive, where a source has one for itself.
        val: validation archives, likewise.
        devkit: development kit with the ground truth of the validation images.
        labels: CSV file with the labels of the validation images, instead.
        image_column: of a table, where its name is not the usual one.
        label_column: likewise.
    """

    path: Path | None = None
    train: Path | None = None
    val: tuple[Path, ...] = ()
    devkit: Path | None = None
    labels: Path | None = None
    image_column: str | None = None
    label_column: str | None = None

    def only(self, source: str, *taken: str) -> None:
        """Make sure that nothing was named that `source` has no use for.

        Raises:
            DataError: naming the flags.
        """
        unused = [one.name for one in fields(self) if one.name not in taken and getattr(self, one.name) != one.default]
        if unused:
            flags = ", ".join("PATH" if name == "path" else "--" + name.replace("_", "-") for name in unused)
            raise DataError(f"{source} has no use for {flags}. Leave that out.")


@dataclass(frozen=True)
class RawImage:
    """An encoded image as the source has it, unchecked; `name` tells where it came from."""

    name: str
    data: bytes


class Split(Protocol):
    """Images 0 to len(labels) - 1. Can be pickled: several processes read, each through files of its own."""

    labels: Labels

    def name(self, index: int) -> str:
        """For messages, and part of the sample's key."""

    def read(self, index: int) -> RawImage:
        """One image.

        Raises:
            BadImage: not even its bytes can be had.
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
