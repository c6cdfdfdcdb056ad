"""The loss scale of fp16 training, where DeepSpeed applies it."""

from __future__ import annotations

from typing import Any


class LossScale:
    """Doubles after so many steps without overflow, and halves at every one: the rule of `torch.amp.GradScaler`.

    DeepSpeed multiplies the loss and divides the gradients by `value`, and finds overflows over all processes, which
    torch's own scaler does not where gradients are partitioned.

    Args:
        value: the scale to begin with.
        interval: steps without overflow before it doubles.
    """

    def __init__(self, value: float = 2.0**16, interval: int = 2000) -> None:
        self.value = value
        self.interval = interval
        self.good = 0

    def update(self, *, overflow: bool) -> None:
        """To be called after every optimizer step; an overflow means that it was left out."""
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.value /= 2
        elif self.good == self.interval:
            self.value, self.good = 2 * self.value, 0

    def state_dict(self) -> dict[str, Any]:
        """In the form of `torch.amp.GradScaler`, so that a run may go on under another strategy."""
        return {
            "scale": self.value,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": self.interval,
            "_growth_tracker": self.good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.interval, self.good = state["scale"], state["growth_interval"], state["_growth_tracker"]
