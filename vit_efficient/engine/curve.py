"""The loss of an optimizer step: of its whole global batch, not of what one rank saw of it last."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vit_efficient.model.module import ViTModule


class StepLoss:
    """Adds up the micro-batches of a step on the device; the ranks' sums meet only when somebody reads them.

    ``value`` is what was read last: ``loss``, and with a teacher ``loss_hard`` and ``loss_soft``, each the mean over a
    global batch, whatever number of ranks and micro-batches it was cut into.
    """

    def __init__(self) -> None:
        self.value: dict[str, float] = {}
        self._names: list[str] = []
        self._sum: Tensor | None = None

    def add(self, module: ViTModule) -> None:
        """Take the micro-batch that the module has just seen; waits for nothing."""
        assert module.last_loss is not None
        self._names = ["loss", *(f"loss_{part}" for part in module.last_parts)]
        losses = torch.stack([module.last_loss, *module.last_parts.values()]).float()
        self._sum = losses if self._sum is None else self._sum + losses

    def read(self, pieces: int) -> None:
        """Put the step's mean into ``value``. All ranks must ask for it; waits for the device.

        Args:
            pieces: ranks x accumulated micro-batches, by which `ViTModule.training_step` has multiplied each share.
        """
        assert self._sum is not None, "add() comes first"
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sum)
        self.value = dict(zip(self._names, (self._sum / pieces).tolist(), strict=True))

    def restart(self) -> None:
        """The next micro-batch is the first of a step."""
        self._sum = None
