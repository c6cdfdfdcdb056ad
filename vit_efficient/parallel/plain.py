"""Strategies that hold a whole model on each device: Lightning's own, with optimizer states by name in checkpoints."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from vit_efficient.parallel.named import NamedStates


class SingleStrategy(NamedStates, SingleDeviceStrategy):
    """One process, one device."""


class DdpStrategy(NamedStates, DDPStrategy):
    """One process a device, gradients averaged over them while they are computed."""

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Lets go of the gradients at once, where Lightning would keep them through the next forward pass.

        They are views of the reducer's buckets, which it makes anew before the second forward pass: until then the
        old ones would live beside the new ones.
        """
        result = super().optimizer_step(optimizer, *args, **kwargs)
        optimizer.zero_grad(set_to_none=True)
        return result
