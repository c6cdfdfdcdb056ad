"""A deployed model's weights are nowhere in floating point: not in the file, not on the device, not in a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm import create_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.kernels.int8_linear.op import cpu_int_mm_is_exact
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.select import find_layers

SCHEMES = {
    "int8": Int8Config(),
    "int8 per tensor": Int8Config(weights="tensor", dynamic_scale="tensor"),
    "W4A8": Int8Config(weight_bits=4, group=32),
    "fp8": Fp8Config(),
}
WIDTH = 96


def deployed(name: str, width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=width, num_heads=2, num_classes=5
    )
    swap_attention(model, SdpaConfig().build())
    config: Any = SCHEMES[name]
    config.apply(model, compute_dtype=torch.float32)
    config.finalize(model)
    return model.eval().requires_grad_(False)


class Floats(TorchDispatchMode):
    """Sizes of all floating-point tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
                self.shapes.add(tuple(tensor.shape))
        return out


def quantized_shapes(model: nn.Module) -> set[tuple[int, ...]]:
    shapes = {tuple(layer.module.shape) for layer in find_layers(model) if hasattr(layer.module, "scheme")}
    assert len(shapes) == 4, "qkv, proj, fc1, fc2"
    return shapes | {shape[::-1] for shape in shapes}


@pytest.mark.parametrize("name", SCHEMES)
def test_no_float_weight_is_held(name: str) -> None:
    model = deployed(name)
    held = [*model.parameters(), *model.buffers()]
    floats = {tuple(t.shape) for t in held if t.dtype in (torch.float32, torch.bfloat16, torch.float16)}
    assert not floats & quantized_shapes(model)


@pytest.mark.skipif(not cpu_int_mm_is_exact(), reason="this processor's integer product is replaced by a float one")
@pytest.mark.parametrize("name", ["int8", "int8 per tensor"])
def test_no_float_weight_is_made_in_a_forward(name: str) -> None:
    model = deployed(name)
    with Floats() as seen, torch.no_grad():
        model(torch.randn(3, 3, 32, 32))  # 3 x 17 tokens: no activation has the shape of a weight
    assert seen.shapes
    assert not seen.shapes & quantized_shapes(model)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gpu_never_holds_them(name: str) -> None:
    """A float copy of one layer alone, 1,024 x 4,096, would take 8 MiB in half precision."""
    model = deployed(name, 1024).to(torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.cuda()
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before < held + 2**20, "moving it makes no copy"
    with Floats() as seen, torch.no_grad():
        model(torch.randn(3, 3, 32, 32, device="cuda", dtype=torch.bfloat16))
    assert not seen.shapes & quantized_shapes(model)
