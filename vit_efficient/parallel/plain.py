"""Strategies that hold a whole model on each device: Lightning's own, with optimizer states by name in checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from vit_efficient.parallel.named import NamedStates


class SingleStrategy(NamedStates, SingleDeviceStrategy):
    """One process, one device."""


class DdpStrategy(NamedStates, DDPStrategy):
    """One process a device, gradients averaged over them while they are computed."""

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        """Without Lightning's stream of its own, on which each gradient would wait for the one that made it; and
        buffers, equal on all ranks from here on, are sent in every forward pass only where a training step changes
        some: the statistics of batch norms, in the stems of a few models."""
        wrapped = DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)
        wrapped.broadcast_buffers = any(isinstance(module, _BatchNorm) for module in model.modules())
        return wrapped

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Lets go of the gradients at once, where Lightning would keep them through the next forward pass.

        They are views of the reducer's buckets, which it makes anew before the second forward pass: until then the
        old ones would live beside the new ones.
        """
        result = super().optimizer_step(optimizer, *args, **kwargs)
        optimizer.zero_grad(set_to_none=True)
        return result
