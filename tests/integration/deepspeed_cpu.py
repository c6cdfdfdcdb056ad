"""`python deepspeed_cpu.py ...` is `python -m vit_efficient.fit ...` with DeepSpeed on a CPU.

Lightning's strategy refuses CPUs, though DeepSpeed runs on them with gloo. What is replaced is that refusal, the
recipe's own, and the choice of the device; stages, gradients, states and checkpoints are the real ones.
"""

from __future__ import annotations

import importlib
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies import deepspeed as lightning_deepspeed

from vit_efficient import fit
from vit_efficient.cli import run_command
from vit_efficient.parallel import deepspeed
from vit_efficient.recipe import deepspeed as refusals


class OnCpu(deepspeed.ZeroStrategy):
    """The real strategy, on CPUs."""

    def __init__(self, *, config: dict[str, Any], timeout: timedelta) -> None:
        # In a model this small ZeRO 3 would spread nothing: so only vectors and the like stay whole.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 500
        super().__init__(config=config, timeout=timeout)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed asks for a number


def nothing(*args: Any) -> list[Any]:
    """Finds nothing to object to."""
    return []


def main() -> None:
    """What `fit` does, with the replacements."""
    deepspeed.ZeroStrategy = OnCpu  # type: ignore[misc]
    refusals.needs_gpus = nothing  # type: ignore[assignment]
    # An all-reduce in shared memory, which a compiler would build at first use.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    lightning_deepspeed._validate_device_index_selection = nothing  # type: ignore[assignment]
    run_command(fit.main)


if __name__ == "__main__":
    main()
