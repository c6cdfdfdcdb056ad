"""A loss that is not a number stops the run and says where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vit_efficient.engine import watch
from vit_efficient.engine.watch import AHEAD, LossWatch, NonFiniteLossError, describe


def batch(*keys: str) -> dict[str, Any]:
    return {"key": list(keys), "weight": torch.ones(len(keys))}


def test_the_weights_of_sound_samples_are_not_read() -> None:
    """They are on the device: a GPU's would be waited for at every step."""
    losses = LossWatch()
    losses.add(torch.tensor(1.0), 0, {"key": ["a"], "weight": torch.ones(1, device="meta")})
    losses.drain()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_step_and_samples(value: float) -> None:
    losses = LossWatch()
    losses.add(torch.tensor(1.0), 6, batch("a"))
    with pytest.raises(NonFiniteLossError, match=r"(?s)step 8.*k0, k1.*and 2 more"):
        losses.add(torch.tensor(value), 7, batch(*(f"k{i}" for i in range(10))))


@pytest.mark.gpu
def test_on_a_gpu_a_few_steps_later_and_draining_notices_at_once() -> None:
    losses = LossWatch()
    losses.add(torch.tensor(float("nan"), device="cuda"), 3, batch("a"))
    for step in range(1, AHEAD):
        losses.add(torch.tensor(1.0, device="cuda"), 3 + step, batch("b"))
    with pytest.raises(NonFiniteLossError, match="step 4"):
        losses.add(torch.tensor(1.0, device="cuda"), 3 + AHEAD, batch("b"))
    losses = LossWatch()
    losses.add(torch.tensor(float("nan"), device="cuda"), 3, batch("a"))
    with pytest.raises(NonFiniteLossError, match="step 4"):
        losses.drain()


def test_the_first_loss_speaks_and_not_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one rank lost in step 5, the sum of gradients gives to all in step 6."""
    monkeypatch.setattr(watch, "gather_over_ranks", lambda own: [own, (4, 0, "The loss became nan at step 5."), None])
    losses = LossWatch()
    losses._queue.append((torch.tensor(float("nan")), None, 5, batch("innocent")))
    with pytest.raises(NonFiniteLossError, match=r"Rank 1: The loss became nan at step 5"):
        watch.refuse_non_finite(losses, torch.nn.Linear(1, 1), 6, 0)


def test_fillers_are_not_named() -> None:
    assert describe({"key": ["a", "b"], "weight": torch.tensor([1.0, 0.0])}) == ["a"]
