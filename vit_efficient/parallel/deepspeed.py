"""DeepSpeed ZeRO 1, 2 and 3 through Lightning, with the arithmetic and the checkpoints of every other strategy.

**Precision.** DeepSpeed's own bf16 and fp16 cast the parameters. Here they stay float32 under autocast, as with
`single`, `ddp` and `fsdp`: adapters and quantization ranges are not rounded, the moving average averages float32, and a
run may change its strategy. The price is that ZeRO 3 gathers 4 bytes a weight where DeepSpeed's own would gather 2;
frozen quantized weights are gathered as they are.

**Checkpoints.** DeepSpeed's own are folders of pickles, which only the same stage and number of processes can resume.
Here optimizer states are gathered by parameter (`parallel.zero`), and the result is the single file that every strategy
writes and reads: weights and optimizer resume under another stage, number of processes or strategy, and nothing in the
file can run. The price is that the first process writes all of it: 12 bytes for each trained weight.

**Gradients** are clipped by DeepSpeed, which alone sees all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.strategies.strategy import _ForwardRedirection

from vit_efficient.parallel import zero
from vit_efficient.parallel.config import ZERO_BUCKET, DeepspeedConfig
from vit_efficient.parallel.named import by_name, by_position
from vit_efficient.parallel.scaling import LossScale

if TYPE_CHECKING:
    import lightning.pytorch as L
    from torch import Tensor, nn
    from torch.optim import Optimizer

HALVES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def build_deepspeed(config: DeepspeedConfig, *, timeout: timedelta) -> ZeroStrategy:
    """The strategy of a resolved recipe.

    Args:
        config: stage and offloading.
        timeout: how long a process waits for the others in a collective operation.
    """
    return ZeroStrategy(config=deepspeed_config(config), timeout=timeout)


def deepspeed_config(config: DeepspeedConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe; Lightning adds accumulation and clipping from its Trainer."""
    section: dict[str, Any] = {
        "stage": config.stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        # Elements. DeepSpeed makes two buffers of the first size, whatever the model's, and its default is 500 million.
        "reduce_bucket_size": ZERO_BUCKET,
        "allgather_bucket_size": ZERO_BUCKET,
        # Of stage 3: weights are let go once used. By default those that return within a billion elements are kept,
        # which in most ViTs are all of them.
        "stage3_max_reuse_distance": 0,
    }
    if config.offload_optimizer:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": config.accelerator == "gpu"}
    if config.offload_parameters:
        section["offload_param"] = {"device": "cpu", "pin_memory": config.accelerator == "gpu"}
    return {
        "zero_optimization": section,
        "zero_allow_untested_optimizer": True,  # it asks for the very class AdamW, and ours is one of its children
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW steps on the CPU too, and needs no compiler
        "bf16": {"enabled": False},  # else Lightning would turn them on, and DeepSpeed would round the weights
        "fp16": {"enabled": False},
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed reports speeds by it and nothing else
    }


class ZeroPrecision(DeepSpeedPrecision):
    """float32 parameters and, for a half precision, autocast around each step; see the module's text."""

    def __init__(self, precision: Any) -> None:
        super().__init__(precision)
        self.scale = LossScale() if precision == "16-mixed" else None

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def inside(self, device: torch.device) -> AbstractContextManager[Any]:
        """Autocast for a step. DeepSpeed switches off any that is on outside of its own forward."""
        if self.precision not in HALVES:
            return nullcontext()
        return torch.autocast(device.type, HALVES[self.precision], cache_enabled=False)

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: L.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Lightning has divided by the number of accumulated micro-batches; DeepSpeed is not to do it again."""
        if self.scale is not None:
            engine: Any = model.trainer.model
            engine.optimizer.override_loss_scale(self.scale.value)
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: L.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        engine: Any = model.trainer.model
        if self.scale is not None and engine.micro_steps % engine.gradient_accumulation_steps() == 0:
            self.scale.update(overflow=engine.optimizer.overflow)
        return result

    def _clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed does it, by the norm over all processes. What the optimizer holds here is one's part."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.scale is not None:
            checkpoint["MixedPrecision"] = self.scale.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.scale is not None and "MixedPrecision" in checkpoint:
            self.scale.load_state_dict(checkpoint["MixedPrecision"])


class _InsideEngine(_ForwardRedirection):
    """Runs a step within DeepSpeed's forward, in the precision's context."""

    def __init__(self, strategy: ZeroStrategy) -> None:
        self.strategy = strategy

    def __call__(self, wrapper_module: Any, original_module: Any, method_name: str, *args: Any, **kwargs: Any) -> Any:
        step = getattr(original_module, method_name)

        def in_context(*inner: Any, **named: Any) -> Any:
            with self.strategy.zero_precision.inside(self.strategy.root_device):
                return step(*inner, **named)

        original_module.__dict__[method_name] = in_context  # the parent looks it up by name
        try:
            return super().__call__(wrapper_module, original_module, method_name, *args, **kwargs)
        finally:
            del original_module.__dict__[method_name]


def _unhook(part: nn.Module) -> None:
    """Take ZeRO 3's hooks from a part of the module that has no parameters (transforms, metrics).

    It would have nothing to gather there, but counts calls and wants them equal in all processes, and the first one
    draws examples for the log.
    """
    for module in part.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


class ZeroStrategy(DeepSpeedStrategy):
    """Lightning's strategy, changed as the module's text says.

    Args:
        config: DeepSpeed's configuration.
        timeout: how long a process waits for the others.
    """

    def __init__(self, *, config: dict[str, Any], timeout: timedelta) -> None:
        super().__init__(config=config, timeout=timeout)
        self._forward_redirection = _InsideEngine(self)
        self.groups: list[list[nn.Parameter]] = []

    @property
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # Lightning gives every DeepSpeed strategy its own plugin, which casts.
        self._precision_plugin = ZeroPrecision(plugin.precision) if isinstance(plugin, DeepSpeedPrecision) else plugin

    @property
    def zero_precision(self) -> ZeroPrecision:
        assert isinstance(self._precision_plugin, ZeroPrecision)
        return self._precision_plugin

    def setup(self, trainer: L.Trainer) -> None:
        assert self.lightning_module is not None
        self.lightning_module.to(self.root_device)  # before the optimizer and the moving average are made from it
        with warnings.catch_warnings():  # ViTModule's own clipping is for the other strategies
            warnings.filterwarnings("ignore", ".*DeepSpeed handles gradient clipping internally.*")
            super().setup(trainer)
        for part in self.lightning_module.children():
            if not any(True for _ in part.parameters()):
                _unhook(part)

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        assert optimizer is not None, "only what trains is set up"
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def gradient_norm(self) -> float:
        """The norm of all gradients of the last step, before clipping. No process has the gradients themselves."""
        return float(self.deepspeed_engine.get_global_grad_norm() or 0.0)

    # -- checkpoints: those of every other strategy -------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Weights are loaded before DeepSpeed cuts them up."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state on the first process; without frozen parameters where the module says that they are not
        needed to resume (``strict_loading``)."""
        assert self.lightning_module is not None
        return zero.gather_state_dict(self.lightning_module, frozen=self.lightning_module.strict_loading)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return by_name(zero.gather_optimizer(self.deepspeed_engine.optimizer, self.groups), self._names())

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        optimizer: Any = self.deepspeed_engine.optimizer
        sizes = iter(range(sum(map(len, self.groups))))
        described = [
            {**settings, "params": [next(sizes) for _ in group]}
            for settings, group in zip(optimizer.optimizer.param_groups, self.groups, strict=True)
        ]
        saved = by_position(checkpoint["optimizer_states"][0], self._names(), described)
        zero.scatter_optimizer(optimizer, self.groups, saved)

    def _names(self) -> list[str]:
        """Of the parameters, in the optimizer's order."""
        assert self.lightning_module is not None
        known = {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}
        return [known[id(parameter)] for group in self.groups for parameter in group]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        DDPStrategy.load_model_state_dict(self, checkpoint, strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        DDPStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return DDPStrategy.load_checkpoint(self, checkpoint_path, weights_only)
