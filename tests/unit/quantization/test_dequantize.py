"""A model file's weights in floating point again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError
from vit_efficient.model.weights import is_quantized, load_state
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.deploy import check_layers, deployed_state, digest, load_deployed
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config

SIZE = 32


def plain() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5
    )
    swap_attention(model, SdpaConfig().build())
    return model.eval()


def quantized(config: Any) -> nn.Module:
    model = plain()
    config.apply(model, compute_dtype=torch.float32)
    if getattr(config, "needs_calibration", False):
        calibrate(model, [torch.randn(16, 3, SIZE, SIZE)], CalibrationConfig(smooth=0.5))
    config.finalize(model)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        Int8Config(),
        Int8Config(activations="static", attention="static"),
        Int4Config(type="int", group=32),
        Int4Config(lora=None),
    ],
    ids=["dynamic", "static", "int4", "nf4"],
)
def test_answers_as_the_file_does(config: Any, tmp_path: Path) -> None:
    """The static one has been shifted and smoothed, its bias corrected; all of that is undone or kept rightly."""
    model, images = quantized(config), torch.randn(4, 3, SIZE, SIZE)
    tensors, metadata = deployed_state(model)
    metadata["digest"] = digest(tensors, metadata)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    again = plain()
    again.load_state_dict(load_state(tmp_path / "model.safetensors"))
    with torch.no_grad():
        wanted, found = model(images), again(images)
    assert (found - wanted).norm() / wanted.norm() < (1e-5 if isinstance(config, Int4Config) else 0.06)
    assert (found - plain()(images)).norm() / wanted.norm() > 1e-4  # and not as the weights before quantization


def test_the_codes_come_back(tmp_path: Path) -> None:
    """Quantization-aware training from a file starts at the file's own codes."""
    model = quantized(Int8Config())
    tensors, metadata = deployed_state(model)
    metadata["digest"] = digest(tensors, metadata)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    again = plain()
    again.load_state_dict(load_state(tmp_path / "model.safetensors"))
    Int8Config().apply(again, compute_dtype=torch.float32)
    for name, tensor in deployed_state(again)[0].items():
        if tensor.dtype == torch.int8:
            assert torch.equal(tensor, tensors[name]), name


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """In any tensor: also where the file is to be trained on and not evaluated."""
    tensors, metadata = deployed_state(quantized(Int8Config()))
    metadata["digest"] = digest(tensors, metadata)
    tensors["blocks.0.attn.qkv.weight"][0, 0] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="altered"):
        load_state(tmp_path / "model.safetensors")


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "smooth"])
def test_scales_that_cannot_be_are_refused(name: str, scale: float) -> None:
    tensors, metadata = deployed_state(quantized(Int8Config(activations="static")))
    tensors[f"blocks.1.mlp.fc2.{name}"].view(-1)[0] = scale
    again = plain()
    with pytest.raises(CheckpointError, match=f"blocks.1.mlp.fc2.*{name} is zero, negative or not a number"):
        load_deployed(again, tensors, metadata)


def test_what_was_not_calibrated_is_not_written() -> None:
    model = plain()
    Int8Config(activations="static").apply(model, compute_dtype=torch.float32)
    with pytest.raises(CheckpointError, match="the layer was not calibrated"):
        check_layers(*deployed_state(model))


def test_rounded_weights_are_told_from_float_ones(tmp_path: Path) -> None:
    for name, model in (("int8", quantized(Int8Config())), ("float", plain())):
        tensors, metadata = deployed_state(model)
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata=metadata)
    assert is_quantized(str(tmp_path / "int8.safetensors"))
    assert not is_quantized(str(tmp_path / "float.safetensors"))
    assert not is_quantized("timm")
    assert not is_quantized(None)


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    tensors, metadata = deployed_state(quantized(Int4Config(lora=LoraConfig(rank=2))))
    metadata["digest"] = digest(tensors, metadata)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="export merge"):
        load_state(tmp_path / "model.safetensors")


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    tensors, metadata = deployed_state(quantized(Int8Config()))
    save_file(tensors, tmp_path / "model.safetensors", metadata={**metadata, "version": "999"})
    with pytest.raises(CheckpointError, match="version '999'"):
        load_state(tmp_path / "model.safetensors")
