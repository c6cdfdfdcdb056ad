"""The fp8 linear layer against a table of e4m3 values and float64 sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vit_efficient.kernels.fp8_linear import op, reference
from vit_efficient.kernels.fp8_linear.reference import Scheme

SCHEMES = [Scheme(weights=w, activations=a) for w in ("channel", "tensor") for a in ("token", "tensor")]
ROWS = (1, 63, 197)
WIDTHS = (192, 768, 100)


def e4m3_values() -> np.ndarray:
    """All finite values by the format's definition (arXiv:2209.05433, table 1), from their bits."""
    values = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue  # NaN
            fraction = mantissa / 8 if exponent == 0 else 1 + mantissa / 8
            values.append(fraction * 2.0 ** (max(exponent, 1) - 7))
    return np.array(sorted({*values, *(-v for v in values)}))


TABLE = e4m3_values()


def extremes(rows: int, k: int) -> Tensor:
    """Random rows, with one of all maxima, one of all minima, one of zeros, one tiny and one huge among them."""
    x = torch.randn(rows, k)
    for index, value in enumerate((1.0, -1.0, 0.0, 1e-38, 1e30)):
        if index < rows:
            x[index] = value
    return x


def test_codes_by_the_definition() -> None:
    """s = amax / 448 and the nearest value of the table, by a search in float64."""
    x = torch.randn(50, 37)
    codes, scale = reference.quantize(x, by_row=True)
    assert codes.dtype == torch.float8_e4m3fn
    assert scale.shape == (50, 1)
    for row, own, s in zip(x.numpy(), codes.float().numpy(), scale[:, 0].numpy(), strict=True):
        assert s == np.float32(np.abs(row).max()) / np.float32(448)
        assert np.abs(own).max() == 448
        assert np.isin(own, TABLE).all()
        wanted = (row / s).astype(np.float64)
        nearest = np.abs(wanted[:, None] - TABLE[None]).min(axis=1)
        np.testing.assert_array_equal(np.abs(wanted - own), nearest)


def test_ties_go_to_the_even_mantissa() -> None:
    x = torch.tensor([[448.0, 1.0625, 1.1875, -1.0625, 2.0**-10, 3 * 2.0**-10]])
    codes, scale = reference.quantize(x, by_row=True)
    assert scale.item() == 1
    assert codes.float().tolist() == [[448, 1, 1.25, -1, 0, 2 * 2.0**-9]]


def test_one_scale_for_a_matrix() -> None:
    x = torch.randn(9, 37)
    codes, scale = reference.quantize(x, by_row=False)
    assert scale.shape == (1, 1)
    assert scale.item() == x.abs().max() / torch.tensor(448.0)
    assert torch.equal(codes.float(), (x / scale).to(torch.float8_e4m3fn).float())
    assert codes.float().abs().flatten()[x.abs().argmax()] == 448


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_any_finite_row(values: list[float]) -> None:
    x = torch.tensor([values, [-v for v in values]], dtype=torch.float32)
    codes, scale = reference.quantize(x, by_row=True)
    back = codes.double()
    assert back.isfinite().all()
    assert torch.equal(back[0], -back[1])
    assert scale.min() >= reference.SMALLEST_SCALE
    # Half a step: 2**-4 of the value, or 2**-10 of the scale where codes are subnormal; and the scale's own rounding.
    exact, s = x.double(), scale.double()
    assert ((back * s - exact).abs() <= (exact.abs() * 2.0**-4 + s * 2.0**-10) * (1 + 1e-6)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    x, weight = torch.randn(3, 16), torch.randn(8, 16)
    spoiled = x.clone()
    spoiled[1, 4] = bad
    broken = weight.clone()
    broken[2, 5] = bad
    assert reference.quantize(spoiled, by_row=True)[1].isnan().flatten().tolist() == [False, True, False]
    for form in (reference.fp8_linear, op.fp8_linear):
        y = form(spoiled, weight, None, Scheme())
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
        assert form(spoiled, weight, None, Scheme(activations="tensor")).isnan().all()
        y = form(x, broken, None, Scheme())
        assert y[:, 2].isnan().all()
        assert y[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("k", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_training_equals_deployed_equals_reference_bit_for_bit(rows: int, k: int, bias: bool, scheme: Scheme) -> None:
    x, weight = extremes(rows, k), extremes(48, k)
    b = torch.randn(48) if bias else None
    trained = op.fp8_linear(x.requires_grad_(), weight.requires_grad_(), b, scheme)
    codes, scale = reference.quantize_weight(weight.detach(), scheme)
    deployed = op.fp8_linear_codes(x.detach(), codes, scale, b, scheme)
    defined = reference.fp8_linear(x.detach(), weight.detach(), b, scheme)
    assert torch.equal(trained.detach(), deployed)
    assert torch.equal(deployed, defined)


@pytest.mark.parametrize("k", [*WIDTHS, 4096])
def test_product_is_the_sum_of_exact_products(k: int) -> None:
    """Within the roundings of a float32 sum of k terms, each product being exact."""
    q_MK, q_NK = (torch.randn(rows, k).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn) for rows in (33, 40))
    exact = q_MK.double() @ q_NK.double().T
    magnitude = q_MK.double().abs() @ q_NK.double().abs().T
    assert ((reference.product(q_MK, q_NK) - exact).abs() <= magnitude * k**0.5 * 2.0**-23).all()


def test_epilogue_has_one_order() -> None:
    total, s_x, s_w, bias = torch.randn(64, 32) * 1e4, torch.rand(64, 1), torch.rand(32, 1), torch.randn(32)
    got = reference.epilogue(total, s_x, s_w, bias).numpy()
    np.testing.assert_array_equal(got, (total.numpy() * s_x.numpy()) * s_w.numpy().T + bias.numpy())
    assert not np.array_equal(got, total.numpy() * (s_x.numpy() * s_w.numpy().T) + bias.numpy())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_dequantized_operands(scheme: Scheme) -> None:
    x = torch.randn(3, 17, 40, requires_grad=True)
    weight, bias = torch.randn(24, 40, requires_grad=True), torch.randn(24, requires_grad=True)
    upstream = torch.randn(3, 17, 24)
    op.fp8_linear(x, weight, bias, scheme).backward(upstream)
    flat = reference.quantize_activations(x.detach().flatten(0, 1), scheme)
    xq = reference.dequantize(*flat).view_as(x).requires_grad_()
    wq = reference.dequantize(*reference.quantize_weight(weight.detach(), scheme)).requires_grad_()
    b = bias.detach().clone().requires_grad_()
    torch.nn.functional.linear(xq, wq, b).backward(upstream)
    for own, expected in ((x, xq), (weight, wq), (bias, b)):
        assert (own.grad - expected.grad).norm() < 1e-6 * expected.grad.norm()


def test_only_the_gradients_asked_for_and_no_float_copy_kept() -> None:
    x, weight = torch.randn(256, 512, requires_grad=True), torch.randn(128, 512, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        op.fp8_linear(x, weight, None, Scheme())
    assert sum(t.numel() * t.element_size() for t in kept) == (256 + 128) * 512 + (256 + 128) * 4
    op.fp8_linear(x.detach(), weight, None, Scheme()).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


def test_close_to_the_float_layer() -> None:
    """The noise of 3 bits of mantissa in both operands, no more: a wrong scale would be far off."""
    x, weight = torch.randn(256, 192), torch.randn(64, 192)
    for scheme in SCHEMES:
        error = (op.fp8_linear(x, weight, None, scheme) - x @ weight.T).norm() / (x @ weight.T).norm()
        assert 0.02 < error < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_output_only(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(9, 64), torch.randn(16, 64), torch.randn(16)
    plain = op.fp8_linear(x, weight, bias, Scheme())
    with torch.autocast("cpu", dtype):
        cast = op.fp8_linear(x, weight, bias, Scheme())
    assert torch.equal(cast, plain.to(dtype))


def test_leading_dimensions_strides_and_no_tokens() -> None:
    x, weight = torch.randn(5, 64, 7).transpose(1, 2), torch.randn(64, 24).t()  # (5, 7, 64), neither contiguous
    y = op.fp8_linear(x, weight, None, Scheme())
    assert y.shape == (5, 7, 24)
    assert torch.equal(y, reference.fp8_linear(x.contiguous(), weight.contiguous(), None, Scheme()))
    for scheme in SCHEMES:
        none, trained = torch.randn(0, 7, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
        y = op.fp8_linear(none, trained, None, scheme)
        assert y.shape == (0, 7, 16)
        y.sum().backward()
        assert trained.grad.abs().max() == 0


def test_padding_adds_zeros_only() -> None:
    codes, _ = reference.quantize(torch.randn(5, 7), by_row=True)
    wide = op.padded(codes, 9, 11)
    assert wide.shape == (16, 16)
    assert torch.equal(wide[:5, :7].float(), codes.float())
    assert wide.float().abs().sum() == codes.float().abs().sum()


def test_custom_op_contract() -> None:
    q, s = reference.quantize(torch.randn(33, 64), by_row=True)
    w, s_w = reference.quantize(torch.randn(16, 64), by_row=True)
    # Not `test_schema`: it compares fp8 tensors by arithmetic that they do not have.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.fp8_matmul, (q, s, w, s_w, torch.randn(16), torch.float32, False), test_utils=utils)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    x, weight = torch.randn(33, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    compiled = torch.compile(op.fp8_linear, fullgraph=True)
    y = compiled(x, weight, None, Scheme())
    y.sum().backward()
    torch.testing.assert_close(y, op.fp8_linear(x, weight, None, Scheme()), rtol=1e-6, atol=1e-6)
    assert x.grad is not None
