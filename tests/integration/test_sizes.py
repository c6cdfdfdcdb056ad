"""Bytes of a quantized ViT-L/16, on disk and on the device, with the default `keep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.measure.memory import weight_bytes
from vit_efficient.quantization.deploy import deployed_state
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (Int8Config(), 0.26),
        (Int8Config(activations="static"), 0.26),
        (Int4Config(type="int", group=128), 0.14),
        (Int4Config(type="int", group=64), 0.144),
        (Int4Config(lora=None), 0.14),
    ],
    ids=["int8", "int8 static", "int4 g128", "int4 g64", "nf4"],
)
def test_share_of_fp32(config: Any, most: float, tmp_path: Path) -> None:
    model = timm.create_model("vit_large_patch16_224")
    fp32 = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert fp32 == pytest.approx(1.217e9, rel=0.001)
    swap_attention(model, SdpaConfig().build())
    config.apply(model, compute_dtype=torch.float32)
    config.finalize(model)
    tensors, metadata = deployed_state(model)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    on_device = weight_bytes(model)
    print(f"{on_disk:,} bytes on disk ({on_disk / fp32:.4f}), {on_device:,} on the device ({on_device / fp32:.4f})")
    assert on_disk / fp32 <= most
    assert on_device / fp32 <= most
