from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_efficient.data.sources.base import Inputs, stratified
from vit_efficient.data.sources.cifar10 import Cifar10Config
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.data.sources.folder import FolderConfig
from vit_efficient.errors import DataError


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.floats(0.01, 0.9), st.integers(0, 99))
def test_each_class_gives_its_share(sizes: list[int], fraction: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    np.random.default_rng(seed).shuffle(labels)
    count = round(fraction * labels.size)
    stay, aside = stratified(labels, count, seed)
    assert sorted([*stay, *aside]) == list(range(labels.size))
    assert aside.size == min(count, labels.size - len(sizes))  # never a class's last image
    for label, size in enumerate(sizes):
        given_up = int((labels[aside] == label).sum())
        assert given_up <= size - 1
        if fraction < 0.5 and min(sizes) > 1:  # every class can give its share
            assert abs(given_up - size * count / labels.size) < 1


def test_the_choice_is_seeded() -> None:
    labels = np.arange(300) % 3
    first, again, other = (stratified(labels, 30, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_what_a_source_has_no_use_for_is_refused() -> None:
    inputs = Inputs(Path("x"), val=(Path("y"),), label_column="z")
    inputs.only("this", "path", "val", "label_column")
    with pytest.raises(DataError, match=re.escape("this has no use for PATH, --label-column. Leave that out.")):
        inputs.only("this", "val")


@pytest.mark.parametrize("config", [FolderConfig, Cifar10Config, DigitsConfig])
def test_every_source_refuses(config: type[FolderConfig | Cifar10Config | DigitsConfig], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no use for --devkit|name no folder or archive"):
        config().open(Inputs(None if config is DigitsConfig else tmp_path, devkit=tmp_path))
