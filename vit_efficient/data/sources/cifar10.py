"""CIFAR-10 (Krizhevsky 2009): 60,000 images of 32 x 32 pixels, from any of the forms that it is handed around in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vit_efficient.config import Config
from vit_efficient.data.encode import encode_png
from vit_efficient.data.sources import cifar10_files
from vit_efficient.data.sources.base import Inputs, Labels, RawImage, Source
from vit_efficient.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10Config(Config):
    """CIFAR-10, from its usual archives or from image sheets."""

    name: Literal["cifar10"] = "cifar10"

    def open(self, inputs: Inputs) -> Source:
        """The archive's own training and test images; all forms give the same shards."""
        inputs.only(self.name, "path")
        if inputs.path is None:
            raise DataError(
                "cifar10 needs the archive, or the folder that it unpacks to: "
                "`python -m vit_efficient.prepare cifar10 cifar-10-binary.tar.gz --out DIR`."
            )
        train, val = (Cifar10Split(part, *_read(inputs.path, part)) for part in ("train", "test"))
        identity = {"sha256": _digest(train, val)}
        return Source(self.name, CLASSES, {"train": train, "val": val}, identity)


class Cifar10Split:
    """Images held in memory, uint8 (n, 32, 32, 3)."""

    def __init__(self, part: str, images: NDArray[np.uint8], labels: Labels) -> None:
        self.part, self.images, self.labels = part, images, labels

    def name(self, index: int) -> str:
        return f"{self.part}_{CLASSES[self.labels[index]]}"

    def read(self, index: int) -> RawImage:
        return RawImage(self.name(index), encode_png(self.images[index]))


def _read(path: Path, part: str) -> tuple[NDArray[np.uint8], Labels]:
    images, labels = cifar10_files.read(path, part)
    foreign = labels[(labels < 0) | (labels >= len(CLASSES))]
    if foreign.size:
        raise DataError(f"{path}: label {foreign[0]} is out of range; CIFAR-10 has classes 0 to 9.")
    return images, labels


def _digest(*splits: Cifar10Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(split.labels.tobytes())
    return digest.hexdigest()
