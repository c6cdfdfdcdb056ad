"""Operators on a GPU as programs use them: captured in CUDA graphs, on a device that is not the current one, with many
heads, without inputs. That what they compute is right is for the files of each kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vit_efficient.errors import CapabilityError, UserError
from vit_efficient.kernels import capability
from vit_efficient.kernels.fp8_attention.op import fp8_attend
from vit_efficient.kernels.int4_linear.op import int4_linear, int4_linear_codes
from vit_efficient.kernels.int8_attention.op import int8_attend
from vit_efficient.kernels.layernorm_quant import op as norms
from vit_efficient.kernels.linear import op as linear
from vit_efficient.kernels.quantize import op as quantization

pytestmark = pytest.mark.gpu
M, D, N, GROUP = 197, 192, 96, 64
EPS = 1e-6


class Inputs:
    """Tensors of all operators, on one device; `refill` draws them anew where they lie."""

    def __init__(self, device: str) -> None:
        half, f32 = {"device": device, "dtype": torch.bfloat16}, {"device": device}
        self.x, self.residual = torch.empty(M, D, **half), torch.empty(M, D, **half)
        self.qkv = torch.empty(2, M, 3, 3, 64, **half)
        self.weight, self.bias = torch.rand(D, **f32) + 0.5, torch.randn(D, **f32)
        self.scale, self.smooth = torch.tensor([0.02], **f32), torch.rand(D, **f32) + 0.5
        self.packed = torch.randint(0, 256, (N, D // 2), dtype=torch.uint8, device=device)
        self.step = torch.rand(N, D // GROUP, **f32).bfloat16()
        self.q_weight, self.weight_scale = quantization.quantize(torch.randn(N, D, **f32))
        self.q = torch.empty(M, D, dtype=torch.int8, device=device)
        self.q_scale = torch.rand(M, 1, **f32) + 0.01
        self.refill()

    def refill(self) -> None:
        for one in (self.x, self.residual, self.qkv):
            one.normal_()
        self.q.random_(-127, 128)

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


def layer(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    return i.q, i.q_scale, i.q_weight, i.weight_scale, None


def norm(i: Inputs) -> tuple[Tensor, Tensor, float]:
    return i.weight, i.bias, EPS


CALLS: dict[str, Callable[[Inputs], Any]] = {
    "quantize": lambda i: quantization.quantize(i.x),
    "quantize static": lambda i: quantization.quantize(i.x, "int8", i.scale, i.bias, i.smooth),
    "quantize fp8": lambda i: quantization.quantize(i.x, "fp8"),
    "dequantize": lambda i: quantization.dequantize(i.q, i.q_scale, torch.bfloat16),
    "clipping": lambda i: quantization.quantize_clipping(i.x, "int8", i.scale),
    "layernorm": lambda i: norms.layernorm(i.x, *norm(i)),
    "layernorm_quant": lambda i: norms.layernorm_quant(i.x, *norm(i)),
    "layernorm_quant fp8": lambda i: norms.layernorm_quant(i.x, *norm(i), "fp8", i.scale),
    "add_layernorm": lambda i: norms.add_layernorm(i.x, i.residual, None, *norm(i)),
    "add_layernorm_quant": lambda i: norms.add_layernorm_quant(i.x, i.residual, i.bias, *norm(i), "int8", i.scale),
    "linear": lambda i: linear.linear(*layer(i), dtype=torch.bfloat16, gelu=True),
    "linear_quant": lambda i: linear.linear_quant(*layer(i), i.scale, gelu=True),
    "int4": lambda i: int4_linear(i.x, i.packed, i.step, None, None, group=GROUP, dtype=torch.bfloat16),
    "int4 codes": lambda i: int4_linear_codes(
        i.q, i.q_scale, i.packed, i.step, None, None, group=GROUP, dtype=torch.bfloat16
    ),
    "int8_attend": lambda i: int8_attend(*i.heads, scale=0.125),
    "int8_attend fp8": lambda i: int8_attend(*i.heads, scale=0.125, values="fp8", keys="block"),
    "fp8_attend": lambda i: fp8_attend(*i.heads, scale=0.125),
    "fp8_attend fp8": lambda i: fp8_attend(*i.heads, scale=0.125, values="fp8"),
    "fp8_attend unrotated codes": lambda i: fp8_attend(*i.heads, scale=0.125, rotated=False, out_scale=i.scale),
}


def run(name: str, inputs: Inputs) -> tuple[Tensor, ...]:
    if "fp8" in name and capability.lacks_fp8(torch.device("cuda", 0)):
        with pytest.raises((CapabilityError, UserError), match="no fp8 matrix units"):
            CALLS[name](inputs)
        pytest.skip("needs fp8 matrix units (sm_89), and said so")
    made = CALLS[name](inputs)
    return made if isinstance(made, tuple) else (made,)


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.float().isfinite().all()
        assert torch.equal(one.float().cpu(), other.float().cpu())


@pytest.mark.parametrize("name", CALLS)
def test_in_a_cuda_graph(name: str) -> None:
    """Captured on some inputs, replayed on others."""
    inputs = Inputs("cuda")
    run(name, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(name, inputs)
    inputs.refill()
    expected = [x.clone() for x in run(name, inputs)]
    for one in found:
        one.zero_()
    graph.replay()
    equal(found, tuple(expected))


@pytest.mark.parametrize("name", CALLS)
def test_on_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = Inputs("cuda:0"), Inputs("cuda:1")
    for key, value in vars(here).items():
        getattr(there, key).copy_(value)
    assert torch.cuda.current_device() == 0
    found = run(name, there)
    torch.cuda.synchronize(1)
    assert all(one.device.index == 1 for one in found)
    equal(found, run(name, here))


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_more_heads_than_a_grid_is_high(form: str) -> None:
    """70,000 pairs of image and head: along y there may be 65,535 programs."""
    if form == "fp8" and capability.lacks_fp8(torch.device("cuda", 0)):
        pytest.skip("needs fp8 matrix units (sm_89)")
    attend: Any = int8_attend if form == "int8" else fp8_attend
    q, k, v = torch.randn(3, 35_000, 2, 5, 16, device="cuda", dtype=torch.bfloat16).unbind(0)
    found = attend(q, k, v, scale=0.25)
    assert torch.equal(found[-9:], attend(q[-9:], k[-9:], v[-9:], scale=0.25))


def test_no_inputs_leave_the_bias() -> None:
    q, one, bias = torch.empty(5, 0, dtype=torch.int8, device="cuda"), torch.ones(1, 1), torch.randn(7)
    y = linear.linear(q, one.cuda(), q.new_empty(7, 0), one.cuda(), bias.cuda(), dtype=torch.float32)
    assert torch.equal(y.cpu(), bias.expand(5, 7))
