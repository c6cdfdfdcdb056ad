"""What a recipe becomes in DeepSpeed's terms, read by DeepSpeed's own classes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from vit_efficient.parallel.config import DeepspeedConfig
from vit_efficient.parallel.scaling import LossScale

pytest.importorskip("deepspeed")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_stage_and_offloading(stage: int, offload: bool) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from vit_efficient.parallel.deepspeed import deepspeed_config

    config = DeepspeedConfig(
        accelerator="gpu", stage=stage, offload_optimizer=offload, offload_parameters=offload and stage == 3
    )
    read = DeepSpeedZeroConfig(**deepspeed_config(config)["zero_optimization"])
    assert read.stage == stage
    assert (read.offload_optimizer is not None) == offload
    assert (read.offload_param is not None) == (offload and stage == 3)
    if offload:
        assert (read.offload_optimizer.device, read.offload_optimizer.pin_memory) == ("cpu", True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_weights_stay_float32(precision: str) -> None:
    """Lightning asks DeepSpeed to cast for a half precision, unless the configuration says no."""
    from lightning.pytorch.plugins.precision import DeepSpeedPrecision

    from vit_efficient.parallel.deepspeed import ZeroPrecision, build_deepspeed

    strategy = build_deepspeed(DeepspeedConfig(accelerator="cpu"), timeout=timedelta(seconds=7))
    strategy.precision_plugin = DeepSpeedPrecision(precision)
    assert isinstance(strategy.precision_plugin, ZeroPrecision)
    assert strategy.precision_plugin.precision == precision
    strategy._format_config()
    assert not strategy.config["bf16"]["enabled"]
    assert not strategy.config["fp16"]["enabled"]
    layer = strategy.precision_plugin.convert_module(torch.nn.Linear(3, 2))
    data = strategy.precision_plugin.convert_input({"weight": torch.ones(2)})
    assert layer.weight.dtype == data["weight"].dtype == torch.float32
    with strategy.precision_plugin.inside(torch.device("cpu")):
        computed = layer(torch.ones(1, 3)).dtype
    assert computed == {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    assert strategy._timeout == timedelta(seconds=7)


def scaler(interval: int) -> Any:
    made = torch.amp.GradScaler("cpu", growth_interval=interval)
    made.scale(torch.ones(1))  # before which it has no scale
    return made


@pytest.mark.parametrize("overflows", ["0000", "1", "0001000", "1100000011"])
def test_loss_scale_moves_as_torchs(overflows: str) -> None:
    """`torch.amp.GradScaler` on a parameter whose gradients overflow at the same steps."""
    own, torchs = LossScale(interval=3), scaler(3)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for step in overflows:
        weight.grad = torch.tensor([float("inf") if step == "1" else 1.0])
        torchs.step(optimizer)
        torchs.update()
        own.update(overflow=step == "1")
        assert own.value == torchs.get_scale()
        assert own.state_dict() == torchs.state_dict()


def test_loss_scale_goes_on_from_torchs_state() -> None:
    torchs = scaler(2000)
    state = {**torchs.state_dict(), "scale": 512.0, "_growth_tracker": 1999}
    own = LossScale()
    own.load_state_dict(state)
    own.update(overflow=False)
    assert (own.value, own.good) == (1024.0, 0)
