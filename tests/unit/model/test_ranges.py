"""Learned quantization ranges in training: no weight decay, frozen at the end, averaged, recomputed, compiled."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.data.device import DeviceTransforms
from vit_efficient.data.image import ImageSpec
from vit_efficient.model.ema import WeightAverage
from vit_efficient.model.module import ViTModule
from vit_efficient.model.optim import build_optimizer, learned_ranges, parameter_groups
from vit_efficient.parallel.order import prepare_blocks
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_layers import learn_scales
from vit_efficient.recipe.schema import OptimConfig

OPTIM = OptimConfig(lr=1e-2, epochs=2, weight_decay=0.5, layer_decay=0.5)
STEPS = 10  # of an epoch


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=10
    )
    swap_attention(model, SdpaConfig().build())
    config = Int8Config(weight_bits=4, activations="hybrid", keep=("head",), learn_scales=True)
    config.apply(model, compute_dtype=torch.float32)
    calibrate(model, [torch.randn(16, 3, 32, 32)], CalibrationConfig(importance=False, rounding="mse"))
    learn_scales(model)
    with torch.no_grad():  # calibrated weights lie on their codes, where the gradients of their steps are 0
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


@pytest.fixture
def model(calibrated: nn.Module) -> nn.Module:
    return copy.deepcopy(calibrated)


def module_of(model: nn.Module, freeze_ranges: float) -> ViTModule:
    transforms = DeviceTransforms(ImageSpec(32, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0), 10)
    return ViTModule(
        model, transforms, OPTIM, lr=1e-2, num_classes=10, steps_per_epoch=STEPS, freeze_ranges=freeze_ranges
    )


def test_ranges_do_not_decay_and_learn_at_the_rate_of_their_block(model: nn.Module) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, OPTIM, 1.0)
    table = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    ranges = learned_ranges(model)
    assert len(ranges) == 9 + 4  # weights of all layers, and inputs of proj and fc2
    for name in ranges:
        beside = name.rpartition(".")[0] + ".weight"
        assert table[name] == (table[beside][0], 0.0)
        assert table[beside][1] == 0.5


@pytest.mark.parametrize(("share", "last"), [(0.0, 19), (0.3, 13), (1.0, -1)])
def test_ranges_freeze_in_the_last_share_of_the_steps(model: nn.Module, share: float, last: int) -> None:
    """Up to and including step `last` of 20 they move; the weights always do."""
    module = module_of(model, share)
    optimizer = build_optimizer(model, OPTIM, 1e-2)
    for step in range(11, 16):
        module._step = step  # as `training_step` has it from the batch
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        module.on_after_backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert (learned_ranges(model).keys() <= moved) == (step <= last)
        assert "blocks.1.mlp.fc2.weight" in moved
        if step > last:
            assert not learned_ranges(model).keys() & moved


def test_average_takes_ranges_in(model: nn.Module) -> None:
    average = WeightAverage(model, 0.5)
    ranges = learned_ranges(model)
    before = {name: p.detach().clone() for name, p in ranges.items()}
    with torch.no_grad():
        for parameter in ranges.values():
            parameter += 1
    average.update()
    moved = {name: p.detach().clone() for name, p in ranges.items()}
    share = 1 - min(0.5, 2 / 11)
    with average.applied():
        for name, parameter in ranges.items():
            torch.testing.assert_close(parameter.detach(), before[name] + share)
        assert model(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert all(torch.equal(ranges[name], moved[name]) for name in ranges)


def gradients(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model.train()(images)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_blocks_have_the_same_logits_and_gradients(model: nn.Module, calibrated: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    prepare_blocks(model.blocks, checkpointing=True, compile=False)
    logits, own = gradients(model, images)
    plain_logits, plain = gradients(copy.deepcopy(calibrated), images)
    assert torch.equal(logits, plain_logits)
    assert own.keys() == plain.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(own[name], plain[name]) for name in own)


@pytest.mark.slow
def test_compiled_blocks_have_the_same_codes(model: nn.Module, calibrated: nn.Module) -> None:
    """The compiler may round a float operation between two layers otherwise, and with it a code now and then."""
    images = torch.randn(2, 3, 32, 32)
    prepare_blocks(model.blocks, checkpointing=False, compile=True)
    logits, own = gradients(model, images)
    plain_logits, plain = gradients(copy.deepcopy(calibrated), images)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-2, atol=1e-2)
    assert own.keys() == plain.keys()
    for name, gradient in own.items():
        assert (gradient - plain[name]).norm() <= 0.01 * plain[name].norm(), name
