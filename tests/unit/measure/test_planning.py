from __future__ import annotations

import numpy as np
import pytest

from vit_efficient.measure.planning import plan_cost, shuffle_quality


def test_a_plan_of_a_billion_samples_is_cheap() -> None:
    """What the data plan promises far past ImageNet. A quiet core takes a fiftieth of these times or less, and anything
    that looks at every one of a billion samples takes more."""
    cost = plan_cost(shards=100_000, samples=10**9, world=1024, workers=8)
    assert cost.samples == 10**9
    assert cost.seconds < 60
    assert cost.peak_bytes < 500e6
    assert cost.seek_seconds < 0.2
    assert cost.epoch_seconds < 2


def test_prepared_shards_are_shuffled_as_well_as_can_be() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(100_000) % 100)
    quality = shuffle_quality(labels, 500, streams=32, batch_size=128)
    for share in (quality.displacement, quality.between_epochs):
        assert share == pytest.approx(1, abs=0.15)
    assert quality.classes == pytest.approx(1, abs=0.01)
    assert quality.worst_batch > 0.9


def test_shards_of_one_class_each_show() -> None:
    labels = np.repeat(np.arange(100), 1000)
    quality = shuffle_quality(labels, 500, streams=32, batch_size=128)
    assert quality.classes < 0.6
    more = shuffle_quality(labels, 500, streams=128, batch_size=128)
    assert more.classes > 1.5 * quality.classes
