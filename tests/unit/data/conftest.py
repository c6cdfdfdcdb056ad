"""Small shards whose images say which sample they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from vit_efficient.data.encode import encode_png
from vit_efficient.data.image import ImageSpec
from vit_efficient.data.manifest import Manifest
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import Encoded, ShardSize, write_shards
from vit_efficient.data.shards import write_index

CLASSES = 3


def sample(number: int, side: int = 12) -> Encoded:
    """Noise that is seeded by the sample's number; its label is the number modulo 3."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Encoded(f"{number:05d}", encode_png(pixels), "png", number % CLASSES)


@pytest.fixture
def image() -> ImageSpec:
    return ImageSpec(8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.9)


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., ShardSet]:
    """Write shards of the given sizes: sample k of all has key `{k:05d}`."""

    def make(counts: Sequence[int], split: str = "train", samples: Sequence[Encoded] | None = None) -> ShardSet:
        folder = tmp_path / "shards" / split
        folder.mkdir(parents=True)
        given = list(samples) if samples is not None else [sample(number) for number in range(sum(counts))]
        entries, done = [], 0
        for number, count in enumerate(counts):
            scan = next(write_shards(given[done : done + count], folder, f"part{number}", ShardSize(samples=count)))
            write_index(folder / scan.entry.file, scan)
            entries.append(scan.entry)
            done += count
        class_counts = tuple(np.bincount([one.label for one in given], minlength=CLASSES).tolist())
        manifest = Manifest(
            source="test", options={}, split=split, class_names=("a", "b", "c"), class_counts=class_counts,
            shards=tuple(entries),
        )  # fmt: skip
        manifest.write(folder)
        return ShardSet(folder, manifest)

    return make
