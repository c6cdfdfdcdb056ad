from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from vit_efficient.data.sources.base import Inputs
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.errors import DataError


def test_digits_are_scikit_learns_in_a_fixed_stratified_split() -> None:
    source = DigitsConfig().open(Inputs())
    train, val = source.splits["train"], source.splits["val"]
    assert (train.labels.size, val.labels.size) == (1437, 360)
    whole = load_digits()
    assert np.array_equal(np.bincount(train.labels) + np.bincount(val.labels), np.bincount(whole.target))
    assert np.abs(np.bincount(val.labels) - np.bincount(whole.target) * 360 / 1797).max() < 1

    known = {np.round(image * 255 / 16).astype(np.uint8).tobytes(): label
             for image, label in zip(whole.images, whole.target, strict=True)}  # fmt: skip
    seen = set()
    for split in (train, val):
        for index in range(split.labels.size):
            pixels = np.asarray(Image.open(io.BytesIO(split.read(index).data)))
            assert pixels.shape == (8, 8, 3)
            assert known[pixels[:, :, 1].tobytes()] == split.labels[index]
            seen.add(pixels.tobytes())
    assert len(seen) == len(known)  # no image in both


def test_digits_take_no_path() -> None:
    with pytest.raises(DataError, match="come with scikit-learn"):
        DigitsConfig().open(Inputs(train=Path("x")))
