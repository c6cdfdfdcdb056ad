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
from vit_efficient.model.weights import load_state
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.deploy import deployed_state
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
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    again = plain()
    again.load_state_dict(load_state(tmp_path / "model.safetensors"))
    Int8Config().apply(again, compute_dtype=torch.float32)
    for name, tensor in deployed_state(again)[0].items():
        if tensor.dtype == torch.int8:
            assert torch.equal(tensor, tensors[name]), name


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    tensors, metadata = deployed_state(quantized(Int4Config(lora=LoraConfig(rank=2))))
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="export merge"):
        load_state(tmp_path / "model.safetensors")


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    tensors, metadata = deployed_state(quantized(Int8Config()))
    save_file(tensors, tmp_path / "model.safetensors", metadata={**metadata, "version": "999"})
    with pytest.raises(CheckpointError, match="version '999'"):
        load_state(tmp_path / "model.safetensors")
