"""Strategies that hold a whole model on each device: Lightning's own, with optimizer states by name in checkpoints."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from vit_efficient.parallel.named import NamedStates


class SingleStrategy(NamedStates, SingleDeviceStrategy):
    """One process, one device."""


class DdpStrategy(NamedStates, DDPStrategy):
    """One process a device, gradients averaged over them while they are computed."""
