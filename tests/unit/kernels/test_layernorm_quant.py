"""LayerNorm that ends in codes, and quantization on its own, on a CPU. Shapes: B batch, T tokens, D width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.formats import FORMATS, format_of
from vit_efficient.kernels.layernorm_quant import op
from vit_efficient.kernels.quantize import op as quantization

B, T, D, EPS = 2, 7, 48, 1e-6


def parameters() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, residual, gamma, weight, bias."""
    torch.manual_seed(0)
    return torch.randn(B, T, D), torch.randn(B, T, D), torch.rand(D), torch.rand(D), torch.randn(D)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("static", [False, True])
def test_codes_times_scales_are_near(static: bool, name: str) -> None:
    x = torch.randn(B, T, D).clamp(-3.8, 3.8)  # within the codes of the given scales
    scale = torch.tensor([0.8 if name == "int4" else 0.03]) if static else None
    codes, scales = quantization.quantize(x, name, scale)
    assert codes.dtype == format_of(name).dtype
    assert scales.shape == (B, T, 1)
    assert codes.float().abs().max() <= format_of(name).largest
    half_step = scales / 2 if name != "fp8" else x.abs() / 16 + scales * 2**-10
    assert ((codes.float() * scales - x).abs() <= half_step * 1.0001).all()


def test_what_is_beyond_is_what_the_last_code_does_not_round() -> None:
    x = torch.tensor([[127.0, 127.4, 127.5, -127.6, 128.0, float("inf"), 0.0]])
    codes, scales, beyond = quantization.quantize_clipping(x, "int8", torch.tensor([1.0]))
    assert beyond.tolist() == [[False, False, True, True, True, True, False]]
    assert codes.tolist() == [[127, 127, 127, -127, 127, 127, 0]]
    assert scales.tolist() == [[1.0]]


def test_a_format_that_is_none() -> None:
    with pytest.raises(ValueError, match="int8, int4, fp8"):
        format_of("int3")


def test_the_norm_is_pytorchs() -> None:
    x, residual, gamma, weight, bias = parameters()
    torch.testing.assert_close(op.layernorm(x, weight, bias, EPS), F.layer_norm(x, (D,), weight, bias, EPS))
    y, new = op.add_layernorm(x, residual, gamma, weight, bias, EPS)
    assert torch.equal(new, residual + gamma * x)
    torch.testing.assert_close(y, F.layer_norm(new, (D,), weight, bias, EPS))


def test_the_norm_sees_the_sum_as_it_is_stored() -> None:
    x, residual, _, weight, bias = parameters()
    y, new = op.add_layernorm(x, residual.bfloat16(), None, weight, bias, EPS)
    assert new.dtype == torch.bfloat16
    assert y.dtype == torch.float32
    assert torch.equal(y, op.layernorm(new, weight, bias, EPS, torch.float32))


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("static", [False, True])
def test_codes_are_those_of_the_norm(static: bool, form: str) -> None:
    x, residual, gamma, weight, bias = parameters()
    scale = torch.tensor([0.03]) if static else None
    expected = quantization.quantize(op.layernorm(x, weight, bias, EPS), form, scale)
    for found, wanted in zip(op.layernorm_quant(x, weight, bias, EPS, form, scale), expected, strict=True):
        assert torch.equal(found.float(), wanted.float())
    y, new = op.add_layernorm(x, residual, gamma, weight, bias, EPS)
    expected = *quantization.quantize(y, form, scale), new
    found_all = op.add_layernorm_quant(x, residual, gamma, weight, bias, EPS, form, scale)
    for found, wanted in zip(found_all, expected, strict=True):
        assert torch.equal(found.float(), wanted.float())


CASES: list[tuple[Any, list[Any]]] = [
    (quantization._quantize, ["int8", None, None, None, None]),
    (quantization._quantize, ["int8", torch.tensor([0.1]), *torch.rand(3, D).add(0.1).unbind()]),
    (quantization._quantize, ["fp8", torch.tensor([0.1]), torch.rand(D), None, None]),
    (quantization.quantize_clipping, ["int8", torch.tensor([0.01])]),
    (op._layernorm, [torch.rand(D), None, EPS, torch.bfloat16]),
    (op._layernorm_quant, [torch.rand(D), torch.rand(D), EPS, "int8", None]),
    (op._add_layernorm, [torch.randn(T, D), torch.rand(D), None, None, EPS, torch.float16]),
    (op._add_layernorm_quant, [torch.randn(T, D).bfloat16(), None, None, None, EPS, "fp8", torch.tensor([0.1])]),
    (op._add_layernorm_quant, [torch.randn(D, T).t(), torch.rand(D), None, None, EPS, "int8", None]),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_operators_keep_pytorchs_rules(case: int, transposed: bool) -> None:
    operator, rest = CASES[case]
    torch.library.opcheck(operator, (torch.randn(D, T).t() if transposed else torch.randn(T, D), *rest))
    torch.library.opcheck(operator, (torch.randn(2 * T, 2 * D)[::2, ::2], *rest))


@pytest.mark.parametrize("scales", [torch.rand(T, 1), torch.rand(1, 1), torch.rand(1, T).t()])
def test_what_codes_stand_for(scales: Tensor) -> None:
    for codes in (torch.randint(-127, 128, (D, T), dtype=torch.int8).t(), torch.randn(T, D).to(torch.float8_e4m3fn)):
        for dtype in (torch.float32, torch.bfloat16):
            found = quantization.dequantize(codes, scales, dtype)
            assert torch.equal(found, (codes.float() * scales).to(dtype))
            assert found.is_contiguous()
            utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(quantization.dequantize, (codes, scales, dtype), test_utils=utils)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_what_is_made_of_transposed_inputs_is_contiguous(form: str) -> None:
    """As the compiler takes it to be: it would stop at other strides."""
    x, residual, gamma, weight, bias = parameters()
    x, residual = (one.transpose(1, 2).contiguous().transpose(1, 2) for one in (x, residual))
    flat = x[0], residual[0]

    def work(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        normed = op.layernorm(x, weight, bias, EPS), *op.add_layernorm(x, residual, gamma, weight, bias, EPS)
        codes = *op.layernorm_quant(x, weight, bias, EPS, form), *quantization.quantize(x, form)
        added = op.add_layernorm_quant(x, residual, gamma, weight, bias, EPS, form)
        return tuple(one.float() * 2 for one in (*normed, *codes, *added))

    assert all(one.is_contiguous() for one in quantization._quantize(flat[0], form, None, None, None, None))
    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    for operands in ((x, residual), flat):
        for found, expected in zip(compiled(*operands), work(*operands), strict=True):
            assert torch.equal(found, expected)


def test_they_compile_without_a_break_from_strided_inputs() -> None:
    x, residual, gamma, weight, bias = parameters()

    def work(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        inner = x[:, 1:], residual[:, 1:]
        return *op.add_layernorm_quant(*inner, gamma, weight, bias, EPS), *quantization.quantize(inner[0])

    compiled = torch.compile(work, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(x, residual), work(x, residual), strict=True):
        assert torch.equal(found, expected)
