"""FSDP2 as a Lightning strategy: one process a device, each holding its part of every parameter.

Lightning's `ModelParallelStrategy` sets the processes up and leaves the sharding to the LightningModule, which hands it
back to `FsdpStrategy.shard`. What it would make of checkpoints (optimizer states by position in the model, although an
optimizer counts in its groups; nothing that another strategy resumes) is replaced: whole tensors by name, as every
strategy writes them, or each process its part (`parallel.folder`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from vit_efficient.errors import CheckpointError
from vit_efficient.parallel import order
from vit_efficient.parallel.config import FsdpConfig
from vit_efficient.parallel.folder import is_folder, read_folder
from vit_efficient.parallel.full import copy, gather, spread
from vit_efficient.parallel.named import by_name, by_position, names_of


class FsdpStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimizer states sharded over all devices, or over those of each node.

    Args:
        config: of the recipe, resolved.
        timeout: how long a collective operation waits.
        sharded: leave tensors in a checkpoint sharded, for a checkpoint that is a folder.
        narrow: dtype that the blocks' parameters are gathered in; None: their own.
    """

    def __init__(
        self, config: FsdpConfig, *, timeout: timedelta, sharded: bool = False, narrow: torch.dtype | None = None
    ) -> None:
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.config = config
        self.sharded = sharded
        self.narrow = narrow

    # -- setting up -------------------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        if self.config.offload and self.root_device.type == "cuda":
            # Norms of gradients that lie in the CPU's memory are summed over the processes there.
            self._process_group_backend = "cpu:gloo,cuda:nccl"
        self._setup_distributed()
        if self.config.shard == "hybrid":
            shape, names = (self.num_nodes, self.num_processes), ("replicate", "shard")
        else:
            shape, names = (self.world_size,), ("shard",)  # type: ignore[assignment]
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every process has its own part of a batch, in each copy of the model."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def shard(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Spread a model's parameters over the devices, in place; a second call changes nothing."""
        if not isinstance(model, FSDPModule):
            # A CPU's layer norm does not take weights of another dtype than its input's.
            narrow = self.narrow if self.root_device.type == "cuda" else None
            order.shard(model, blocks, self.device_mesh, gather=narrow, offload=self.config.offload)

    def model_to_device(self) -> None:
        """Move what is not sharded; sharded parameters are where they belong, offloaded ones on the CPU."""
        assert self.lightning_module is not None
        for child in self.lightning_module.children():
            if not isinstance(child, FSDPModule):
                child.to(self.root_device)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the module, by name; a frozen base, say, is not gathered to be left out."""
        module: Any = self.lightning_module
        return self.assembled({k: v for k, v in module.state_dict().items() if module.is_saved(k)})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        assert self.lightning_module is not None
        return self.assembled(by_name(own.state_dict(), names_of(own, self.lightning_module)))

    def assembled(self, state: dict[str, Any]) -> dict[str, Any]:
        """A part of a checkpoint as it is to be written: gathered, unless every process writes its own."""
        whole: dict[str, Any] = state if self.sharded else gather(state)
        return whole

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        if not is_folder(path):
            return self.checkpoint_io.load_checkpoint(path)
        assert self.lightning_module is not None
        own = dict(self.lightning_module.named_parameters())
        return read_folder(path, own | {name.removeprefix("model."): tensor for name, tensor in own.items()})

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        saved = checkpoint["state_dict"]
        strangers = saved.keys() - own.keys()
        missing = own.keys() - saved.keys() if strict else set()
        wrong = {name for name in own.keys() & saved.keys() if own[name].shape != saved[name].shape}
        if different := sorted(strangers | missing | wrong):
            raise CheckpointError(
                f"The checkpoint is of another model: {', '.join(different[:4])}"
                f"{' and more' if len(different) > 4 else ''} differ. Resume with the recipe in that run's folder."
            )
        for name, tensor in saved.items():
            copy(own[name], tensor)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        parameters = dict(self.lightning_module.named_parameters())
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            states = {name: _spread(state, parameters.get(name)) for name, state in saved["state"].items()}
            names, groups = names_of(optimizer, self.lightning_module), optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(by_position({**saved, "state": states}, names, groups))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self.sharded or self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)


def _spread(state: dict[str, Any], parameter: nn.Parameter | None) -> dict[str, Any]:
    """An optimizer's state of one parameter, sharded as that is."""
    if not isinstance(parameter, DTensor):
        return state
    return {
        key: spread(value, parameter) if torch.is_tensor(value) and value.shape == parameter.shape else value
        for key, value in state.items()
    }
