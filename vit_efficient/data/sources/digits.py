"""scikit-learn's handwritten digits: 1,797 real 8x8 images that ship inside the package."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vit_efficient.config import Config
from vit_efficient.data.encode import encode_png
from vit_efficient.data.sources.base import Inputs, RawImage, Source, Subset, stratified
from vit_efficient.errors import DataError

VAL_IMAGES = 360
_SPLIT_SEED = 0  # part of the data set's definition: every run evaluates on the same 360 images


class DigitsConfig(Config):
    """scikit-learn's embedded handwritten digits; `fit` prepares them by itself."""

    name: Literal["digits"] = "digits"

    def open(self, inputs: Inputs) -> Source:
        """1,437 training and 360 validation images, stratified, always the same."""
        if inputs != Inputs():
            raise DataError(
                "digits come with scikit-learn: name no folder or archive. "
                "Try `python -m vit_efficient.prepare digits --out DIR`."
            )
        digits = Digits()
        train, val = stratified(digits.labels, VAL_IMAGES, _SPLIT_SEED)
        splits = {"train": Subset(digits, train), "val": Subset(digits, val)}
        return Source(self.name, tuple("0123456789"), splits, {"images": digits.labels.size})


class Digits:
    """All images, grey values of 0 to 16 scaled to 0 to 255, as 8x8 RGB."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.labels = labels.astype(np.int64)
        self._images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def name(self, index: int) -> str:
        return f"digit_{self.labels[index]}"

    def read(self, index: int) -> RawImage:
        return RawImage(self.name(index), encode_png(np.repeat(self._images[index, :, :, None], 3, axis=2)))
