"""A loss that is not a number stops the run and says where."""

from __future__ import annotations

import pytest
import torch

from vit_efficient.engine.watch import AHEAD, LossWatch, NonFiniteLossError, describe


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_step_and_samples(value: float) -> None:
    watch = LossWatch()
    watch.add(torch.tensor(1.0), 6, ["a"])
    with pytest.raises(NonFiniteLossError, match=r"(?s)step 8.*k0, k1.*and 2 more"):
        watch.add(torch.tensor(value), 7, [f"k{i}" for i in range(10)])


@pytest.mark.gpu
def test_on_a_gpu_a_few_steps_later_and_draining_notices_at_once() -> None:
    watch = LossWatch()
    watch.add(torch.tensor(float("nan"), device="cuda"), 3, ["a"])
    for step in range(1, AHEAD):
        watch.add(torch.tensor(1.0, device="cuda"), 3 + step, ["b"])
    with pytest.raises(NonFiniteLossError, match="step 4"):
        watch.add(torch.tensor(1.0, device="cuda"), 3 + AHEAD, ["b"])
    watch = LossWatch()
    watch.add(torch.tensor(float("nan"), device="cuda"), 3, ["a"])
    with pytest.raises(NonFiniteLossError, match="step 4"):
        watch.drain()


def test_fillers_are_not_named() -> None:
    assert describe({"key": ["a", "b"], "weight": torch.tensor([1.0, 0.0])}) == ["a"]
