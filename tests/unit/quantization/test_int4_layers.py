"""bitsandbytes' 4-bit layer as we use it: evaluating, saving, loading and copying leave its weight what it was."""

from __future__ import annotations

import copy
import io
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from vit_efficient.quantization.int4_layers import FrozenLinear4bit

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4, double": {"type": "nf4", "double_quant": True, "compute_dtype": torch.float32},
    "nf4": {"type": "nf4", "double_quant": False, "compute_dtype": torch.float32},
    "fp4, double": {"type": "fp4", "double_quant": True, "compute_dtype": torch.float32},
}


def make(seed: int = 0, **options: Any) -> FrozenLinear4bit:
    torch.manual_seed(seed)
    return FrozenLinear4bit.of(nn.Linear(192, 320), **(options or OPTIONS["nf4, double"]))


def dequantized(layer: FrozenLinear4bit) -> Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_leaves_the_weight_alone_and_computes_as_training_does(name: str) -> None:
    """bitsandbytes' own layer repacks it on a CPU with AVX512-BF16, and computes in bfloat16 from then on."""
    layer, x = make(**OPTIONS[name]), torch.randn(5, 192)
    before, trained = dequantized(layer), layer.train()(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), trained)
    assert torch.equal(dequantized(layer), before)
    torch.testing.assert_close(trained, nn.functional.linear(x, before, layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_round_trip_through_weights_only(name: str) -> None:
    layer, x, file = make(**OPTIONS[name]).eval(), torch.randn(5, 192), io.BytesIO()
    expected = layer(x)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make(1, **OPTIONS[name]).eval()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


def test_state_of_another_kind_or_shape_is_named() -> None:
    layer = make()
    with pytest.raises(RuntimeError, match="not a nf4 weight"):
        layer.load_state_dict(make(**OPTIONS["fp4, double"]).state_dict())
    turned = FrozenLinear4bit.of(nn.Linear(320, 192), **OPTIONS["nf4, double"])  # as many bytes
    with pytest.raises(RuntimeError, match=r"\(192, 320\)"):
        layer.load_state_dict(turned.state_dict())
    with pytest.raises(RuntimeError, match="not a nf4 weight"):
        layer.load_state_dict(nn.Linear(192, 320).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


def test_a_copy_stands_alone() -> None:
    layer, x = make().eval(), torch.randn(2, 192)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    layer.load_state_dict(make(1).state_dict())
    assert torch.equal(twin(x), expected)


def test_gradient_passes_through_and_stops_at_the_weight() -> None:
    layer, x, upstream = make(), torch.randn(5, 192, requires_grad=True), torch.randn(5, 320)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ dequantized(layer), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in layer.parameters())


def test_autocast_decides_the_output() -> None:
    layer = make(type="nf4", double_quant=True, compute_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(5, 192)).dtype == torch.bfloat16
    assert layer.bias.dtype == torch.bfloat16  # from the start: a forward does not change the state


def test_half_the_bytes_of_int8() -> None:
    """4 bits a weight, and with double quantization about 8 bits for every 64 of them."""
    state = make().state_dict()
    bits = 8 * (state["weight"].numel() + state["weight.absmax"].numel()) / (192 * 320)
    assert bits == 4 + 8 / 64
