"""Notices a loss that is not a number, without making the device wait."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from vit_efficient.errors import UserError


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; the checkpoints on disk are finite."""


class LossWatch:
    """Checks every loss; on a GPU one step late, by which time its value is on the host anyway.

    Reading a loss at once would empty the device's queue at every step. Each loss is copied to pinned memory behind an
    event instead and looked at when the next one has been queued; `drain` looks at all of them, before a checkpoint.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, int, list[str]]] = deque()

    def add(self, loss: Tensor, step: int, keys: list[str]) -> None:
        """Take the loss of optimizer step ``step`` and look at the one before.

        Raises:
            NonFiniteLossError: naming step and samples.
        """
        event = None
        if loss.is_cuda:
            host = torch.empty((), dtype=loss.dtype, pin_memory=True)
            host.copy_(loss, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            host = loss
        self._queue.append((host, event, step, keys))
        while len(self._queue) > (1 if event is not None else 0):
            self._check()

    def drain(self) -> None:
        """Look at every loss taken so far."""
        while self._queue:
            self._check()

    def _check(self) -> None:
        host, event, step, keys = self._queue.popleft()
        if event is not None:
            event.synchronize()
        value = float(host)
        if math.isfinite(value):
            return
        named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        raise NonFiniteLossError(
            f"The loss became {value} at step {step + 1}.\n"
            f"  samples: {named}\n"
            "  Checkpoints are only written of finite losses, so the last one is good. Lower `optim.lr`, "
            "set `optim.clip=1`, or, under fp16, take `quantization.precision=bf16`."
        )


def describe(batch: dict[str, Any]) -> list[str]:
    """Keys of the samples that count in a batch."""
    return [key for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True) if weight > 0]
