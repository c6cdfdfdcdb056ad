"""Static scales of fp8 activations: calibrated, trained on, deployed and stored, one arithmetic throughout."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError
from vit_efficient.kernels.fp8_linear.reference import LARGEST, Scheme, dequantize, quantize_activations
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.deploy import check_layers, deployed_state, load_deployed
from vit_efficient.quantization.fit_fp8 import HEADROOM
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.fp8_layers import DeployedFp8, TrainableFp8, trainable

STATIC = Scheme(activations="static")


def layer() -> TrainableFp8:
    torch.manual_seed(0)
    return trainable(nn.Linear(32, 24), STATIC)


def rows(count: int = 64, size: float = 3.0) -> Tensor:
    return size * torch.randn(count, 32, generator=torch.Generator().manual_seed(1))


def test_before_calibration_nothing_but_nan() -> None:
    assert layer()(rows()).isnan().all()


@pytest.mark.parametrize("rounding", ["nearest", "mse", "gptq"])
def test_the_range_has_room_and_no_shift(rounding: Any) -> None:
    made, x = layer(), rows() + 5
    found = made.fit("one", x, None, CalibrationConfig(rounding=rounding))
    assert made.shift is None
    assert made.input_scale is not None
    assert float(made.input_scale) == pytest.approx(HEADROOM * float(x.abs().max()) / LARGEST)
    assert 0 < found.error < 5e-3
    assert made.static


def test_training_form_equals_deployed_form() -> None:
    made = layer()
    made.fit("one", rows(), None, CalibrationConfig())
    deployed = made.to_deployed()
    assert isinstance(deployed, DeployedFp8)
    x = torch.cat((rows(8), 100 * rows(8)))  # the latter saturate
    assert made(x).equal(deployed(x))
    assert deployed.input_scale is not None
    assert deployed.to(torch.bfloat16).input_scale.dtype == torch.float32


def test_what_saturates_has_no_gradient() -> None:
    made = layer()
    made.fit("one", rows(), None, CalibrationConfig())
    assert made.input_scale is not None
    limit = float(LARGEST * made.input_scale)
    x = torch.full((1, 32), 0.5 * limit)
    x[0, :4] = torch.tensor([1.01, -1.01, 0.99, -0.99]) * limit
    x.requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :2].eq(0).all()
    assert x.grad[0, 2:].ne(0).all()
    codes, scale = quantize_activations(x.detach(), STATIC, made.input_scale)
    torch.testing.assert_close(dequantize(codes, scale)[0, :2], torch.tensor([limit, -limit]))


def test_hybrid_is_static_where_another_kernel_quantizes() -> None:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    images = torch.randn(16, 3, 32, 32)
    swap_attention(model, SdpaConfig().build())
    with torch.no_grad():
        wanted = model(images)
    config = Fp8Config(activations="hybrid")
    assert config.needs_calibration
    config.apply(model, compute_dtype=torch.float32)
    assert model.blocks[0].attn.proj.static
    assert model.blocks[0].mlp.fc2.static
    assert not model.blocks[0].attn.qkv.static
    with pytest.raises(CheckpointError, match="calibrated"):
        check_layers(*deployed_state(model))
    calibrate(model, [images], CalibrationConfig())
    config.finalize(model)
    with torch.no_grad():
        found = model(images)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()

    tensors, description = deployed_state(model)
    check_layers(tensors, description)
    fresh = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    swap_attention(fresh, SdpaConfig().build())
    load_deployed(fresh, tensors, description)
    with torch.no_grad():
        assert fresh(images).equal(found)
    del tensors["blocks.0.mlp.fc2.input_scale"]
    with pytest.raises(CheckpointError, match="it lacks input_scale"):
        load_deployed(fresh, tensors, description)
