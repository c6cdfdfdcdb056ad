"""Configuration -> Lightning strategy: the one place that knows them all."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from vit_efficient.parallel.config import DdpConfig, DeepspeedConfig, DistributedConfig, FsdpConfig, SingleConfig

if TYPE_CHECKING:
    import torch
    from lightning.pytorch.strategies import Strategy


def build_strategy(config: object, *, sharded: bool = False, narrow: torch.dtype | None = None) -> Strategy:
    """What `lightning.pytorch.Trainer` takes as ``strategy``.

    Args:
        config: a resolved strategy of a recipe.
        sharded: write checkpoints as folders, every process its part (``checkpoint.sharded``).
        narrow: dtype in which a sharded model's blocks may be gathered; None: their own.
    """
    if not isinstance(config, DistributedConfig):
        from vit_efficient.parallel.plain import SingleStrategy

        assert isinstance(config, SingleConfig), "resolve() makes `auto` concrete"
        return SingleStrategy("cuda:0" if config.accelerator == "gpu" else "cpu")
    timeout = timedelta(seconds=config.timeout)
    # A product's kernel has every multiprocessor until it ends. NCCL's kernels come before the next one, and not piece
    # by piece where one has a gap: of a step of ViT-L on two H200s they took 7 ms beside the others, and not 21.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    if isinstance(config, DdpConfig):
        from vit_efficient.parallel.plain import DdpStrategy

        return DdpStrategy(timeout=timeout, gradient_as_bucket_view=True, bucket_cap_mb=config.bucket_mb)
    if isinstance(config, FsdpConfig):
        from vit_efficient.parallel.fsdp import FsdpStrategy

        return FsdpStrategy(config, timeout=timeout, sharded=sharded, narrow=narrow)
    assert isinstance(config, DeepspeedConfig), "the last of the union"
    from vit_efficient.parallel.deepspeed import build_deepspeed

    return build_deepspeed(config, timeout=timeout)
