"""The kernel of 4-bit layers against its definition. Shapes: M rows, K inputs, N outputs, G groups of inputs."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels.int4_linear import reference
from vit_efficient.kernels.int4_linear import triton as kernels
from vit_efficient.kernels.int8_linear import reference as int8
from vit_efficient.kernels.int8_linear.packing import pack
from vit_efficient.kernels.int8_linear.scheme import Scheme

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ROWS = (1, 17, 65, 197) if INTERPRETED else (1, 2, 16, 17, 63, 65, 197, 256, 577, 5000)
Weight = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated without a value holds one that shows."""
    make = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        return x.fill_(math.nan if x.dtype.is_floating_point else 99)

    monkeypatch.setattr(torch, "empty", poisoned)


def weight(inputs: int, outputs: int, group: int, zero: bool, device: torch.device) -> Weight:
    """As a deployed layer stores it: packed codes, scales, zero points."""
    w_NK = torch.randn(outputs, inputs)
    scheme = Scheme(weight_bits=4, group=group, zero_point=zero, activations="none")
    if not zero:
        codes, scale = int8.quantize_weight(w_NK, scheme)
        return pack(codes).to(device), scale.bfloat16().to(device), None
    scale, zeros = int8.weight_range(w_NK, scheme)
    codes, _ = int8.quantize_weight(w_NK, scheme, scale, zeros)
    offsets = zeros.to(torch.int8).repeat_interleave(group, dim=1)[:, :inputs]
    return pack(codes, offsets).to(device), scale.bfloat16().to(device), zeros.to(torch.uint8).to(device)


def compare(x: Tensor, w: Weight, bias: Tensor | None, group: int, activations: Any, dtype: torch.dtype) -> None:
    found = kernels.int4_linear(x, *w, bias, group, activations, dtype)
    expected = reference.int4_linear(x, *w, bias, group=group, activations=activations, dtype=dtype)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    difference = found.double() - expected.double()
    assert float(difference.norm() / expected.double().norm()) < ERROR[dtype]


@pytest.mark.parametrize("activations", ["none", "token"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_outputs_are_those_of_the_definition(group: int, zero: bool, activations: str, device: torch.device) -> None:
    for inputs, outputs in ((192, 70),) if INTERPRETED else ((192, 576), (1024, 3072), (4096, 1024), (384, 70)):
        w = weight(inputs, outputs, group, zero, device)
        for rows in ROWS:
            for dtype in DTYPES:
                x = torch.randn(rows, inputs).to(device, dtype)
                bias = torch.randn(outputs).to(device)
                compare(x, w, bias if rows % 2 else None, group, activations, dtype)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("one_scale", [False, True])
def test_codes_that_are_at_hand(one_scale: bool, group: int, device: torch.device) -> None:
    """Of whatever kind: 8 bits, 4 bits, a scale a row or one in all, strided."""
    w = weight(192, 70, group, True, device)
    bias = torch.randn(70).to(device)
    for rows in ROWS[:3]:
        for largest in (127, 7):
            q = torch.randint(-largest, largest + 1, (2 * rows, 200), dtype=torch.int8).to(device)[::2, 8:]
            scale = torch.rand(1 if one_scale else rows, 1).to(device) + 0.01
            for dtype in DTYPES:
                found = kernels.int4_linear_codes(q, scale, *w, bias, group, dtype)
                expected = reference.int4_linear_codes(q, scale, *w, bias, group=group, dtype=dtype)
                assert found.dtype == dtype
                assert float((found.double() - expected.double()).norm() / expected.double().norm()) < ERROR[dtype]


@pytest.mark.parametrize("inputs", [1, 33, 97, 160, 577])
@pytest.mark.parametrize("activations", ["none", "token"])
def test_inputs_that_fill_no_group_and_no_byte(inputs: int, activations: str, device: torch.device) -> None:
    for group in (32, 128):
        w = weight(inputs, 40, group, True, device)
        compare(torch.randn(5, inputs, device=device), w, None, group, activations, torch.float32)


def test_strided_rows(device: torch.device) -> None:
    w = weight(64, 48, 64, True, device)
    whole = torch.randn(30, 200, device=device)
    for x in (whole[::2, 7:71], whole.t()[:64].t()):
        compare(x, w, None, 64, "none", torch.float32)
        compare(x, w, None, 64, "token", torch.float32)


def test_a_row_that_is_not_finite_is_seen(device: torch.device) -> None:
    w = weight(128, 48, 64, True, device)
    for activations in ("none", "token"):
        x = torch.randn(5, 128, device=device)
        x[2, 77] = math.nan
        y = kernels.int4_linear(x, *w, None, 64, activations, torch.float32)
        assert y[2].isnan().all()
        assert y[[0, 1, 3, 4]].isfinite().all()


def test_parts_of_the_inputs() -> None:
    """Enough of them to fill the GPU, none empty, none where rows are many."""
    for rows in (1, 16, 17, 64, 197, 256, 5000):
        for groups in range(1, 70):
            for tiles in (1, 3, 16, 128, 264, 1000):
                split = kernels.parts(rows, tiles, groups, processors=132)
                each = -(-groups // split)
                assert 1 <= split <= 8
                assert (split - 1) * each < groups <= split * each
                assert split == 1 or rows <= 256
    assert kernels.parts(1, 16, 16, processors=132) == 8
    assert kernels.parts(197, 64, 16, processors=132) == 2
    assert kernels.parts(1, 264, 16, processors=132) == 1


@pytest.mark.gpu
def test_a_deployed_layer_never_holds_a_float_weight(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_efficient.quantization.int8_deployed import DeployedInt8

    monkeypatch.undo()
    scheme = Scheme(weight_bits=4, group=64, zero_point=True, activations="none")
    layer = DeployedInt8((4096, 4096), True, scheme).to(device)
    layer.weight, layer.weight_scale, layer.weight_zero = weight(4096, 4096, 64, True, device)  # type: ignore[assignment]
    x = torch.randn(16, 4096, device=device, dtype=torch.bfloat16)
    layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(x)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096  # half of a bfloat16 copy
    codes, scale = layer.weight_codes(), layer.weight_scale.float().repeat_interleave(64, dim=1)
    expected = F.linear(x.double(), codes.double() * scale.double(), layer.bias.double())
    assert float((y.double() - expected).norm() / expected.norm()) < ERROR[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("activations", ["token", "static"])
def test_a_fused_layer_never_unpacks_its_groups(
    activations: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vit_efficient.quantization.fused_linear import view
    from vit_efficient.quantization.int8_deployed import DeployedInt8

    monkeypatch.undo()
    scheme = Scheme(weight_bits=4, group=64, zero_point=True, activations=activations)
    layer = DeployedInt8((4096, 4096), True, scheme).to(device)
    layer.weight, layer.weight_scale, layer.weight_zero = weight(4096, 4096, 64, True, device)  # type: ignore[assignment]
    if activations == "static":
        layer.input_scale = torch.tensor(0.03, device=device)
    fused = view(layer)
    assert not isinstance(fused, str)
    x = torch.randn(16, 4096, device=device)
    codes = fused.codes(x)
    fused.output(codes, torch.float32)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = fused.output(codes, torch.float32)
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096  # the codes as bytes
    assert torch.equal(y, layer(x))
    there = layer.cpu()(x.cpu())
    assert float((y.cpu() - there).norm() / there.norm()) < ERROR[torch.float32]


@pytest.mark.gpu
def test_operator_in_a_cuda_graph(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_efficient.kernels.int4_linear.op import int4_linear

    monkeypatch.undo()
    w = weight(1024, 1024, 64, True, device)
    x = torch.randn(197, 1024, device=device, dtype=torch.bfloat16)
    expected = int4_linear(x, *w, None, group=64, dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = int4_linear(x, *w, None, group=64, dtype=torch.bfloat16)
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)
