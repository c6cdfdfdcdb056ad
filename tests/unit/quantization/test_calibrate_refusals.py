"""What calibration refuses, and that it names the layer."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import UserError
from vit_efficient.quantization.calibrate import FEWEST, calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int8 import Int8Config

STATIC = Int8Config(keep=("head",), activations="static")
QUICK = CalibrationConfig(importance=False, rounding="mse")


def quantized(config: Int8Config = STATIC) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=10
    )
    swap_attention(model, SdpaConfig().build())
    config.apply(model, compute_dtype=torch.float32)
    return model.eval()


def images(count: int = 32) -> list[Tensor]:
    return list(torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(20))


@pytest.mark.parametrize("count", [0, 1, FEWEST - 1])
def test_too_few_images(count: int) -> None:
    model = quantized()
    with pytest.raises(UserError, match=rf"{count} images are too few.*{FEWEST} are the least"):
        calibrate(model, images(count=count) if count else [], QUICK)
    calibrate(model, images(count=FEWEST), QUICK)  # these do


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite(bad: float) -> None:
    batches = images()
    batches[1][3, 0, 5, 5] = bad
    with pytest.raises(UserError, match=r"images hold a NaN or an infinity.*--verify"):
        calibrate(quantized(), batches, QUICK)


@pytest.mark.parametrize("config", [STATIC, Int8Config(keep=("head",))], ids=["static", "dynamic"])
@pytest.mark.parametrize("importance", [False, True])
def test_weights_that_are_not_finite_are_named(config: Int8Config, importance: bool) -> None:
    model = quantized(config)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"^blocks\.1\.mlp\.fc1: .*NaN or an infinity"):
        calibrate(model, images(), CalibrationConfig(importance=importance))


def test_activations_that_are_not_finite_are_named() -> None:
    model = quantized()
    with torch.no_grad():
        model.blocks[0].norm2.bias[5] = float("inf")
    with pytest.raises(UserError, match=r"^blocks\.0\.mlp\.fc1: .*activations hold a NaN or an infinity"):
        calibrate(model, images(), CalibrationConfig(importance=False))


def test_attention_that_is_not_finite_is_named() -> None:
    model = quantized(STATIC.model_copy(update={"attention": "static"}))
    with torch.no_grad():
        model.blocks[1].norm1.bias[5] = float("nan")
    with pytest.raises(UserError, match=r"^blocks\.1\.attn: .*NaN or an infinity"):
        calibrate(model, images(), QUICK)


def zeroed(norm: nn.LayerNorm) -> None:
    nn.init.zeros_(norm.weight)
    nn.init.ones_(norm.bias)


def test_a_layer_that_sees_a_constant_is_named() -> None:
    for importance in (False, True):
        model = quantized()
        zeroed(model.blocks[1].norm2)
        with pytest.raises(UserError, match=r"^blocks\.1\.mlp\.fc1 saw the same input for every token.*keep"):
            calibrate(model, images(), QUICK.model_copy(update={"importance": importance}))


def test_a_constant_is_no_harm_to_dynamic_scales() -> None:
    model = quantized(Int8Config(keep=("head",)))
    zeroed(model.blocks[1].norm2)
    calibrate(model, images(), CalibrationConfig())
    with torch.no_grad():
        assert model(torch.cat(images())).isfinite().all()


def test_images_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(UserError, match=r"^All calibration images are the same"):
        calibrate(quantized(), [torch.zeros(20, 3, 32, 32)], CalibrationConfig())


def test_attention_of_zeros_is_named() -> None:
    model = quantized(STATIC.model_copy(update={"attention": "static"}))
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[48:96] = 0
        model.blocks[0].attn.qkv.bias[48:96] = 0
    with pytest.raises(UserError, match=r"^blocks\.0\.attn: queries, keys or values are zero"):
        calibrate(model, images(), QUICK)


@pytest.mark.parametrize("importance", [False, True])
def test_a_layer_that_is_never_called_is_named(importance: bool) -> None:
    model = quantized()
    model.blocks[1].mlp.forward = lambda x: x
    with pytest.raises(UserError, match=r"^blocks\.1\.mlp\.fc1 is never called.*keep"):
        calibrate(model, images(), CalibrationConfig(importance=importance))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
