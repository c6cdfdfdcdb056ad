"""4-bit layers as a fused block calls them: what stays packed, what is unpacked once, and what a GPU is given.

Shapes: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vit_efficient.kernels.int8_linear import reference
from vit_efficient.kernels.int8_linear.packing import pack
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization import int8_deployed
from vit_efficient.quantization.fused_linear import Codes, FusedLinear, view
from vit_efficient.quantization.int8_deployed import DeployedInt8

K, N = 70, 24
GROUPS = [Scheme(weight_bits=4, group=32, activations=a) for a in ("token", "static", "tensor")]
GROUPS.append(Scheme(weight_bits=4, group=64, activation_bits=4))


def layer_of(scheme: Scheme) -> DeployedInt8:
    """With random codes, scales and bias."""
    layer = DeployedInt8((N, K), True, scheme)
    codes, scale = reference.quantize_weight(torch.randn(N, K), scheme)
    layer.weight = pack(codes) if scheme.weight_bits == 4 else codes
    layer.weight_scale, layer.bias = scale.to(layer.weight_scale.dtype), torch.randn(N)
    if layer.input_scale is not None:
        layer.input_scale.fill_(0.02)
    return layer


def fused(layer: DeployedInt8) -> FusedLinear:
    made = view(layer)
    assert isinstance(made, FusedLinear)
    return made


def no_unpacking(*_: Any) -> Tensor:
    raise AssertionError("the whole weight was unpacked")


@pytest.mark.parametrize("scheme", GROUPS, ids=str)
def test_groups_are_multiplied_packed_on_a_gpu(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way out of the layer asks the kernel; nothing but it sees the packed weight."""
    layer = fused(layer_of(scheme))
    monkeypatch.setattr(int8_deployed, "unpack", no_unpacking)
    asked: list[torch.dtype] = []
    kernel = int8_deployed.int4_linear_codes

    def watch(*x: Any, **options: Any) -> Tensor:
        asked.append(options["dtype"])
        return kernel(*x, **options)

    monkeypatch.setattr(int8_deployed, "int4_linear_codes", watch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, buffer in layer.layer.named_buffers():
            setattr(layer.layer, name, torch.empty_like(buffer, device="cuda"))
        rows = (1, 1) if scheme.activations == "tensor" else (2, 5, 1)
        x = Codes(torch.empty(2, 5, K, dtype=torch.int8, device="cuda"), torch.empty(rows, device="cuda"))
        residual = torch.empty(2, 5, N, dtype=torch.bfloat16, device="cuda")
        assert layer.output(x, torch.bfloat16).shape == (2, 5, N)
        assert layer.output_gelu(x, torch.bfloat16).dtype == torch.bfloat16
        assert layer.add_output(x, residual, None).shape == residual.shape
    assert asked == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("scheme", GROUPS, ids=str)
def test_both_ways_are_one_arithmetic(scheme: Scheme) -> None:
    layer = layer_of(scheme)
    x = torch.randn(2, 5, K)
    codes = fused(layer).codes(x)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = layer.multiply(x, dtype)
        assert torch.equal(fused(layer).output(codes, dtype), wanted)
        assert torch.equal(layer.multiply_codes(*codes, layer.bias, dtype), wanted)


def test_a_weight_with_one_scale_a_row_is_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(Scheme(weight_bits=4))
    before, x = layer.state_dict(), torch.randn(2, 5, K)
    wanted, codes = layer(x), layer.weight_codes()
    view_of = fused(layer)
    assert torch.equal(layer.unpacked, codes)
    assert layer.state_dict().keys() == before.keys()  # nothing of it is saved
    monkeypatch.setattr(int8_deployed, "unpack", no_unpacking)
    for _ in range(2):
        assert torch.equal(view_of.output(view_of.codes(x), torch.float32), wanted)


def test_what_is_unpacked_follows_the_layer() -> None:
    layer, other = layer_of(Scheme(weight_bits=4)), layer_of(Scheme(weight_bits=4))
    x = torch.randn(2, 5, K)
    wanted = other(x)
    fused(layer)
    layer.to(torch.bfloat16)
    assert layer.unpacked.dtype == torch.int8
    copied, stored = copy.deepcopy(layer), pickle.dumps(layer)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), wanted)
    for one in (copied, pickle.loads(stored)):
        assert not torch.equal(one(x), wanted)
        one.load_state_dict(other.state_dict())
        assert torch.equal(one(x), wanted)


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(group=32), *GROUPS], ids=str)
def test_others_hold_nothing_more(scheme: Scheme) -> None:
    layer = layer_of(scheme)
    held = {name: x.nbytes for name, x in layer.named_buffers()}
    fused(layer)
    assert {name: x.nbytes for name, x in layer.named_buffers()} == held
