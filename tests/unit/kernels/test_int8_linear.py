"""The integer layer against exact arithmetic in Python's and NumPy's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vit_efficient.kernels.int8_linear import op, reference
from vit_efficient.kernels.int8_linear.scheme import Scheme

ROWS = (1, 63, 197, 257, 577)
WIDTHS = (192, 768, 1024, 4096)


def exact(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    return torch.from_numpy(q_MK.numpy().astype(np.int64) @ q_NK.numpy().astype(np.int64).T)


def extremes(rows: int, k: int) -> Tensor:
    """Random rows, with one of all maxima, one of all minima, one of zeros, one tiny and one huge among them."""
    x = torch.randn(rows, k)
    for index, value in enumerate((1.0, -1.0, 0.0, 1e-38, 1e30)):
        if index < rows:
            x[index] = value
    return x


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_matmul_is_exact_with_all_maximum_rows(rows: int, k: int) -> None:
    q_MK = torch.randint(-127, 128, (rows, k), dtype=torch.int8)
    q_NK = torch.randint(-127, 128, (40, k), dtype=torch.int8)
    q_MK[0], q_NK[0], q_NK[1] = 127, 127, -127
    expected = exact(q_MK, q_NK)
    assert expected[0, 0] == 127 * 127 * k
    for form in (reference.int8_matmul, op.int8_matmul):
        assert torch.equal(form(q_MK, q_NK).long(), expected), form


def test_too_wide_is_refused() -> None:
    wide = torch.ones(1, reference.WIDEST + 1, dtype=torch.int8)
    for form in (reference.int8_matmul, op.int8_matmul):
        with pytest.raises(ValueError, match="overflow"):
            form(wide, wide)


def test_codes_by_the_definition() -> None:
    """s = amax / 127, ties to even, in float64 and Python's round as a second opinion."""
    x = torch.randn(50, 37)
    codes, scale = reference.quantize_rows(x)
    assert codes.dtype == torch.int8
    for row, own, s in zip(x.numpy(), codes.numpy(), scale[:, 0].numpy(), strict=True):
        assert s == np.float32(np.abs(row).max()) / np.float32(127)
        assert np.abs(own).max() == 127  # the maximum itself is 127, never 128
        np.testing.assert_array_equal(own, np.rint(row / s))


def test_ties_go_to_even_and_the_sign_is_symmetric() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    codes, _ = reference.quantize_rows(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]


@pytest.mark.parametrize("k", WIDTHS)
def test_fast_form_has_the_codes_and_scales_of_the_definition(k: int) -> None:
    x = extremes(97, k)
    for a, b in zip(op.quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x = torch.randn(3, 16)
    x[1, 4] = bad
    for form in (reference.int8_linear, lambda *a: op.int8_linear(*a)):
        y = form(x, torch.randn(8, 16), None)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_training_equals_deployed_equals_reference_bit_for_bit(rows: int, k: int, bias: bool) -> None:
    x, weight = extremes(rows, k), extremes(48, k)
    b = torch.randn(48) if bias else None
    trained = op.int8_linear(x.requires_grad_(), weight.requires_grad_(), b)
    codes, scale = op.quantize_rows(weight.detach())
    deployed = op.int8_linear_codes(x.detach(), codes, scale.squeeze(1), b)
    defined = reference.int8_linear(x.detach(), weight.detach(), b)
    assert torch.equal(trained.detach(), deployed)
    assert torch.equal(deployed, defined)


def test_leading_dimensions_and_strides() -> None:
    base = torch.randn(5, 64, 7)
    x = base.transpose(1, 2)  # (5, 7, 64), not contiguous
    weight = torch.randn(64, 24).t()
    expected = reference.int8_linear(x.contiguous(), weight.contiguous(), None)
    assert torch.equal(op.int8_linear(x, weight), expected)
    assert op.int8_linear(x, weight).shape == (5, 7, 24)


def test_gradients_are_those_of_the_dequantized_operands() -> None:
    x = torch.randn(3, 17, 40, requires_grad=True)
    weight = torch.randn(24, 40, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    upstream = torch.randn(3, 17, 24)
    op.int8_linear(x, weight, bias).backward(upstream)
    xq = reference.dequantize_rows(*reference.quantize_rows(x.detach())).requires_grad_()
    wq = reference.dequantize_rows(*reference.quantize_rows(weight.detach())).requires_grad_()
    b = bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(xq, wq, b).backward(upstream)
    for own, expected in ((x, xq), (weight, wq), (bias, b)):
        error = (own.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-6


def test_close_to_the_float_layer() -> None:
    """Quantization noise of 8 bits, no more: a wrong scale would be far off."""
    x, weight = torch.randn(256, 192), torch.randn(64, 192)
    error = (op.int8_linear(x, weight) - x @ weight.T).norm() / (x @ weight.T).norm()
    assert 0.002 < error < 0.02


def test_autocast_decides_the_output_only() -> None:
    x, weight = torch.randn(9, 64), torch.randn(16, 64)
    plain = op.int8_linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = op.int8_linear(x, weight)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain.to(torch.bfloat16))


def test_custom_op_contract() -> None:
    q = torch.randint(-127, 128, (33, 64), dtype=torch.int8)
    torch.library.opcheck(op.int8_matmul, (q, torch.randint(-127, 128, (16, 64), dtype=torch.int8)))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    x, weight = torch.randn(33, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    compiled = torch.compile(op.int8_linear, fullgraph=True)
    y = compiled(x, weight)
    y.sum().backward()
    torch.testing.assert_close(y, op.int8_linear(x, weight), rtol=1e-6, atol=1e-6)
    assert x.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("k", [*WIDTHS, 100])
@pytest.mark.parametrize("rows", ROWS)
def test_gpu_has_the_integers_of_the_cpu(rows: int, k: int) -> None:
    x, weight, bias = extremes(rows, k), extremes(40, k), torch.randn(40)
    q_MK, _ = reference.quantize_rows(x)
    q_NK, _ = reference.quantize_rows(weight)
    assert torch.equal(op.int8_matmul(q_MK.cuda(), q_NK.cuda()).cpu().long(), exact(q_MK, q_NK))
    for own, expected in zip(op.quantize_rows(x.cuda()), reference.quantize_rows(x), strict=True):
        assert torch.equal(own.cpu(), expected)  # codes and scales, to the last bit
    on_cpu = reference.int8_linear(x, weight, bias)
    on_gpu = op.int8_linear(x.cuda(), weight.cuda(), bias.cuda()).cpu()
    assert torch.equal(on_gpu, on_cpu)  # the same operations in the same order, each rounded alike


@pytest.mark.gpu
@pytest.mark.parametrize("k", [64, 2048])  # in the compiled program, and by a kernel of its own
def test_compiled_on_a_gpu_as_on_the_cpu(k: int) -> None:
    x, weight, bias, grad = (torch.randn(shape) for shape in ((70, k), (48, k), (48,), (70, 48)))

    def run(call: Callable[..., Tensor], device: str) -> list[Tensor]:
        operands = [one.to(device).requires_grad_() for one in (x, weight, bias)]
        y = call(*operands)
        return [one.detach().cpu() for one in (y, *torch.autograd.grad(y, operands, grad.to(device)))]

    found, wanted = (
        run(torch.compile(op.int8_linear, fullgraph=True, dynamic=False), "cuda"),
        run(op.int8_linear, "cpu"),
    )
    if k > 1024:  # the codes' own kernel divides as the definition does
        assert found[0].equal(wanted[0])
    for one, other in zip(found, wanted, strict=True):  # the compiler's division is an ulp off here and there
        assert (one - other).norm() < (1e-5 if k > 1024 else 1e-3) * other.norm()


@pytest.mark.parametrize("form", [reference.quantize_activations, op.quantize_activations])
@pytest.mark.parametrize("tokens", [0, 3])
def test_activations_that_are_not_quantized_have_no_codes(form: object, tokens: int) -> None:
    """They were once quantized a token at a time, without a word."""
    with pytest.raises(ValueError, match="does not quantize activations"):
        form(torch.randn(tokens, 8), Scheme(activations="none"))  # type: ignore[operator]
