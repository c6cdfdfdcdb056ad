"""Notices losses and weights that are not numbers, without making the device wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.cli import USER_ERROR
from vit_efficient.engine.ranks import gather_over_ranks
from vit_efficient.errors import UserError

REMEDY = (
    "Checkpoints are only written of finite losses and weights, so the last one is good. Lower `optim.lr`, "
    "set `optim.clip=1`, or, under fp16, take `quantization.precision=bf16`."
)


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; the checkpoints on disk are finite.

    Args:
        text: for the user.
        step: of the loss, from 0.
    """

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


AHEAD = 3  # losses on their way from the device to the host


class LossWatch:
    """Checks every loss; on a GPU AHEAD micro-batches late, by which time its value is on the host anyway.

    Reading a loss at once would empty the device's queue at every step, and one step late the host could never be more
    than a step ahead, which is not enough where its steps take now less and now more than the device's. Each loss is
    copied to pinned memory behind an event; `drain` looks at all of them, before a checkpoint.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, int, dict[str, Any]]] = deque()

    def add(self, loss: Tensor, step: int, batch: Mapping[str, Any]) -> None:
        """Take the loss of optimizer step ``step``, and look at one before.

        Args:
            loss: of a micro-batch.
            step: that it belongs to, from 0.
            batch: `key` and `weight` of its samples, read only if they have to be named: the weights are on the device.

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
        self._queue.append((host, event, step, {name: batch[name] for name in ("key", "weight")}))
        while len(self._queue) > (AHEAD if event is not None else 0):
            self._check()

    def drain(self) -> None:
        """Look at every loss taken so far."""
        while self._queue:
            self._check()

    def _check(self) -> None:
        host, event, step, samples = self._queue.popleft()
        if event is not None:
            event.synchronize()
        value = float(host)
        if math.isfinite(value):
            return
        keys = describe(samples)
        named = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        raise NonFiniteLossError(f"The loss became {value} at step {step + 1}.\n  samples: {named}\n  {REMEDY}", step)


def describe(batch: Mapping[str, Any]) -> list[str]:
    """Keys of the samples that count in a batch; waits for its device."""
    return [key for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True) if weight > 0]


def non_finite_weights(module: nn.Module) -> list[str]:
    """Names of the trained parameters in which something is not a finite number; of sharded ones, in this rank's part.

    A finite loss says that the weights before the step were sound; what the step made of them is in these.
    """
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    local = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in trained.items()}
    if not local:
        return []
    sound = torch.stack([p.isfinite().all() for p in local.values()]).tolist()  # one wait for the device, for all
    return [name for name, finite in zip(local, sound, strict=True) if not finite]


def refuse_non_finite(watch: LossWatch, module: nn.Module, step: int, rank: int) -> None:
    """To be called by all ranks before a checkpoint: none is written if any of them has lost its numbers.

    Args:
        watch: its losses that were not looked at yet are.
        module: what would be saved.
        step: optimizer steps done.
        rank: of this process; rank 0 speaks for all.

    Raises:
        NonFiniteLossError: on rank 0, saying which rank; the others end with `SystemExit`, in silence.
    """
    problem: tuple[int, int, str] | None = None  # of one rank all others have it a step later: the first counts
    try:
        watch.drain()
    except NonFiniteLossError as error:
        problem = error.step, 0, str(error)
    if problem is None and (names := non_finite_weights(module)):
        named = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        text = f"Step {step} made weights that are not finite: {named}. They are not saved.\n  {REMEDY}"
        problem = step - 1, 1, text
    problems = [(*found[:2], number, found[2]) for number, found in enumerate(gather_over_ranks(problem)) if found]
    if not problems:
        return
    if rank > 0:
        raise SystemExit(USER_ERROR)
    at, _, number, text = min(problems)
    raise NonFiniteLossError(f"Rank {number}: {text}" if number else text, at)
