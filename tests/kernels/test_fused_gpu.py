"""Fused models on a GPU: compiled whole, captured whole, and near the unfused model on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.kernels import capability
from vit_efficient.model.fused import fuse_blocks
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.int8 import Int8Config

pytestmark = pytest.mark.gpu
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
QUANTIZATIONS: dict[str, Any] = {
    "int8": Int8Config(),
    "hybrid": Int8Config(activations="hybrid"),
    "integer attention": Int8Config(attention="static", activations="hybrid"),
    "4-bit rows": Int8Config(weight_bits=4),
    "4-bit groups": Int8Config(weight_bits=4, group=32, zero_point=True),
    "fp8": Fp8Config(activations="hybrid"),
}


def fused(name: str) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A fused model on the GPU, images there, the logits that the unfused one makes of them on the CPU, and how far
    these move with the smallest change of the images: sound programs drift apart by as much."""
    if name == "fp8" and capability.lacks_fp8(torch.device("cuda", 0)):
        pytest.skip("needs fp8 matrix units (sm_89)")
    config, images = QUANTIZATIONS[name], torch.randn(16, 3, 32, 32)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    swap_attention(model, SdpaConfig().build())
    config.apply(model, compute_dtype=torch.float32)
    if config.needs_calibration:
        calibrate(model, [images], config.calibration or CalibrationConfig())
    config.finalize(model)
    with torch.no_grad():
        logits = model.eval()(images)
        moved = model(images * (1 + 2**-23))
    drift = float((moved - logits).norm() / logits.norm())
    assert fuse_blocks(model).count() == "2 of 2 blocks fused"
    return model.cuda(), images.cuda(), logits, drift


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected.cpu()).norm() / expected.norm())


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_compiles_into_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, images, expected, drift = fused(name)
    bound = max(5e-2 if name == "fp8" else 1e-2, 3 * drift)
    torch.compiler.reset()
    with torch.no_grad():
        eager = model(images)
        compiled = torch.compile(model, fullgraph=True)(images)
    assert apart(eager, expected) < bound
    assert apart(compiled, eager) < bound


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_in_a_cuda_graph(name: str) -> None:
    model, images, *_ = fused(name)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(images)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(images)
        images.normal_()
        expected = model(images)
        found.zero_()
        graph.replay()
    assert apart(found, expected) < 1e-2
