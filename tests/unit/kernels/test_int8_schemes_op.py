"""The integer linear layer under every scheme: the fast form against the definition, and the definition against
exact arithmetic; gradients against the formulas; 4-bit codes in bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from vit_efficient.kernels.int8_linear import op, reference
from vit_efficient.kernels.int8_linear.packing import pack, unpack
from vit_efficient.kernels.int8_linear.scheme import Scheme

K, N = 50, 24  # no group divides K


def schemes() -> Iterator[object]:
    weights = [
        {},
        {"weights": "tensor"},
        {"group": 16},
        {"weight_bits": 4},
        {"weight_bits": 4, "weights": "tensor"},
        {"weight_bits": 4, "group": 16},
        {"weight_bits": 4, "zero_point": True},
        {"weight_bits": 4, "group": 16, "zero_point": True},
        {"weight_bits": 4, "group": 64, "zero_point": True},  # one group, and not a whole one
    ]
    for own, activations, bits in itertools.product(weights, ("token", "tensor", "static"), (8, 4)):
        scheme = Scheme(activations=activations, activation_bits=bits, **own)  # type: ignore[arg-type]
        name = "-".join(str(value) for value in own.values()) or "channel"
        yield pytest.param(scheme, id=f"{name}-{activations}{bits}")


SCHEMES = list(schemes())


def operands(scheme: Scheme, rows: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Inputs, weight, bias, and the scale of static inputs, narrow enough for some of them to saturate."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, K, generator=generator)
    for row, value in zip(range(rows), (1.0, -1.0, 0.0, 1e-38, 1e30), strict=False):
        x[row] = value
    weight = torch.randn(N, K, generator=generator) + 0.3
    weight[0], weight[1], weight[2] = 0.0, -1.0, 2.0
    bias = torch.randn(N, generator=generator)
    return x, weight, bias, torch.tensor(2 / scheme.largest_activation) if scheme.activations == "static" else None


def given_steps(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Steps as calibration would find them: narrower than the range, so that weights saturate."""
    if scheme.zero_point:
        scale, zero = reference.weight_range(weight, scheme)
        return 0.7 * scale, zero
    return 0.7 * reference.quantize_weight(weight, scheme)[1], None


@pytest.mark.parametrize("given", [False, True], ids=["largest magnitude", "given"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_equals_deployed_equals_reference_bit_for_bit(scheme: Scheme, given: bool) -> None:
    x, weight, bias, input_scale = operands(scheme)
    scale, zero = given_steps(weight, scheme) if given else (None, None)
    defined = reference.int8_linear(x, weight, bias, torch.float32, scheme, input_scale, scale, zero)
    trained = op.int8_linear(x, weight, bias, scheme, input_scale, scale, zero)
    codes, made = op.quantize_weight(weight, scheme, scale, zero)
    deployed = op.int8_linear_codes(x, codes, made, bias, scheme, input_scale)
    assert defined.isfinite().all()
    assert torch.equal(trained, defined)
    assert torch.equal(deployed, defined)
    scales = (1, 1) if scheme.weights == "tensor" else (N, scheme.groups(K))
    assert made.shape == scales


@pytest.mark.parametrize("scheme", SCHEMES)
def test_definition_by_exact_arithmetic(scheme: Scheme) -> None:
    """Codes by rounding in float64, integer sums in NumPy's int64, scales in float64."""
    x, weight, bias, input_scale = operands(scheme)
    x = x[5:]  # without the extreme rows, next to which float32 sums would lose the others
    codes_MK, scale_M1 = reference.quantize_activations(x, scheme, input_scale)
    codes_NK, scale_NG = reference.quantize_weight(weight, scheme)
    assert codes_MK.abs().max() == scheme.largest_activation
    if scheme.zero_point:
        _, zero = reference.weight_range(weight, scheme)
        stored = codes_NK + zero.repeat_interleave(scheme.group or K, dim=1)[:, :K]
        assert (stored.amin(), stored.amax()) == (0, 15)
    else:
        assert codes_NK.abs().max() == scheme.largest_weight
    size = scheme.group or K
    expected = np.zeros((len(x), N))
    for g in range(scheme.groups(K)):
        part = slice(g * size, (g + 1) * size)
        sums = codes_MK[:, part].numpy().astype(np.int64) @ codes_NK[:, part].numpy().astype(np.int64).T
        column = scale_NG[:, min(g, scale_NG.shape[1] - 1)].numpy().astype(np.float64)
        expected += sums * scale_M1.numpy().astype(np.float64) * column
    expected += bias.numpy().astype(np.float64)
    own = reference.int8_linear(x, weight, bias, torch.float32, scheme, input_scale).numpy()
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    # And what is rounded is the operands, by half a step at most where nothing saturates.
    step_NK = (scale_NG if scheme.group is None else scale_NG.repeat_interleave(size, dim=1)[:, :K]).expand(N, K)
    # The range of zero points ends on a whole step: the farthest value may be one half step beyond its last code.
    slack = 1.001 if scheme.zero_point else 0.5001
    assert ((codes_NK * step_NK - weight).abs() <= slack * step_NK).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_leaves_the_integers_alone(scheme: Scheme) -> None:
    x, weight, bias, input_scale = operands(scheme)
    expected = reference.int8_linear(x, weight, bias, torch.float32, scheme, input_scale)
    with torch.autocast("cpu", torch.bfloat16):
        defined = reference.int8_linear(x, weight, bias, torch.float32, scheme, input_scale)
        trained = op.int8_linear(x, weight, bias, scheme, input_scale)
    assert torch.equal(defined, expected)
    assert torch.equal(trained, expected.to(torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_inputs_that_are_not_finite(scheme: Scheme, bad: float) -> None:
    """A NaN shows in its row (in every row, where all share a scale); an infinity too, but it saturates if static."""
    x, weight, bias, input_scale = operands(scheme, rows=9)
    x[4:] = torch.randn(5, K)
    x[6, 3] = bad
    forms = (
        reference.int8_linear(x, weight, bias, torch.float32, scheme, input_scale),
        op.int8_linear(x, weight, bias, scheme, input_scale),
    )
    for y in forms:
        if scheme.activations == "tensor":
            assert y.isnan().all()
        elif (scheme.activations == "static" and bad != bad) or scheme.activations == "token":
            assert y[6].isnan().all()
        else:
            assert y[6].isfinite().all()
        if scheme.activations != "tensor":
            assert y[[5, 7, 8]].isfinite().all()
    assert torch.equal(forms[0].nan_to_num(), forms[1].nan_to_num())


@pytest.mark.parametrize("given", [False, True], ids=["largest magnitude", "given"])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.values[0].activations != "tensor"])
def test_weights_that_are_not_finite(scheme: Scheme, given: bool) -> None:
    """Their output is NaN, and all others are where rows have scales of their own."""
    x, weight, bias, input_scale = operands(scheme)
    scale, zero = given_steps(weight, scheme) if given else (None, None)
    weight[5, 7] = float("nan")
    y = op.int8_linear(x, weight, bias, scheme, input_scale, scale, zero)
    assert y[:, 5].isnan().all()
    if scheme.weights == "channel":
        assert y[:, [4, 6]].isfinite().all()
    defined = reference.int8_linear(x, weight, bias, torch.float32, scheme, input_scale, scale, zero)
    assert torch.equal(y.isnan(), defined.isnan())
    assert torch.equal(y.nan_to_num(), defined.nan_to_num())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens(scheme: Scheme) -> None:
    _, weight, bias, input_scale = operands(scheme)
    x = torch.empty(0, 3, K, requires_grad=True)
    leaf = weight.requires_grad_()
    y = op.int8_linear(x, leaf, bias, scheme, input_scale)
    assert y.shape == (0, 3, N)
    y.sum().backward()
    assert x.grad is not None
    assert leaf.grad is not None
    assert not leaf.grad.any()
    defined = reference.int8_linear(x.detach(), weight.detach(), bias, torch.float32, scheme, input_scale)
    assert defined.shape == (0, 3, N)
    codes, scale = op.quantize_weight(weight.detach(), scheme)
    assert op.int8_linear_codes(x.detach(), codes, scale, bias, scheme, input_scale).shape == (0, 3, N)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_gradient_of_an_input_stops_where_it_saturates() -> None:
    """One token, one weight of 1: the gradient of each input is 1 within the range and 0 beyond it."""
    scheme = Scheme(activations="static")
    x = torch.tensor([[0.3, -126.4, 127.0, 127.49, 127.51, -127.6, 500.0, float("inf")]], requires_grad=True)
    op.int8_linear(x, torch.ones(1, 8), None, scheme, torch.tensor(1.0)).sum().backward()
    assert x.grad is not None
    assert [round(value, 4) for value in x.grad[0].tolist()] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_gradient_of_an_input_step_is_that_of_lsq() -> None:
    """Equation 3 of the paper, by hand: round(v) - v within the range, the last code beyond it; v = x / step."""
    scheme = Scheme(activations="static", activation_bits=4)
    x = torch.tensor([[0.3, -1.4, 2.6, 3.0, 9.0, -8.0]]) * 0.5
    step = torch.tensor(0.5, requires_grad=True)
    op.int8_linear(x, torch.ones(1, 6), None, scheme, step).sum().backward()
    expected = (0 - 0.3) + (-1 + 1.4) + (3 - 2.6) + 0 + 7 - 7
    assert step.grad is not None
    assert float(step.grad) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weight_bits=4),
        Scheme(weight_bits=4, weights="tensor"),
        Scheme(weight_bits=4, group=16),
        Scheme(weight_bits=4, group=16, zero_point=True),
        Scheme(weight_bits=4, zero_point=True),
        Scheme(group=32),
    ],
    ids=str,
)
def test_gradient_of_weight_steps_by_loops(scheme: Scheme) -> None:
    """Each weight by itself in Python, with the limits of its zero point, each sum over what shares a step."""
    x, weight, _, _ = operands(scheme)
    x = x[5:15]
    scale, zero = given_steps(weight, scheme)
    leaf, step = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    towards = torch.randn(10, N, generator=torch.Generator().manual_seed(3))
    op.int8_linear(x, leaf, None, scheme, None, step, zero).backward(towards)
    assert leaf.grad is not None
    assert step.grad is not None
    seen = reference.dequantize_rows(*reference.quantize_rows(x)).double()
    through = towards.double().T @ seen  # the gradient of the dequantized weight
    by_weight, by_step = torch.zeros(N, K, dtype=torch.float64), torch.zeros(scale.shape, dtype=torch.float64)
    saturated = 0
    for n, k in itertools.product(range(N), range(K)):
        place = (0, 0) if scheme.weights == "tensor" else (n, k // (scheme.group or K))
        low, high = -scheme.largest_weight, scheme.largest_weight
        if zero is not None:
            low, high = -int(zero[place]), 15 - int(zero[place])
        v = np.float32(weight[n, k]) / np.float32(scale[place])
        code = int(np.rint(v))
        if low <= code <= high:
            by_weight[n, k] = through[n, k]
            by_step[place] += through[n, k] * (code - float(v))
        else:
            saturated += 1
            by_step[place] += through[n, k] * (low if code < low else high)
    assert saturated > 10
    torch.testing.assert_close(leaf.grad.double(), by_weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.grad.double(), by_step, rtol=1e-4, atol=1e-3)


def test_gradient_of_a_step_where_everything_saturates_is_a_plain_derivative() -> None:
    """Beyond the range the output is linear in the step, so finite differences must agree with the formula."""
    scheme = Scheme(weight_bits=4, activations="static", activation_bits=4)
    x, weight = torch.full((3, 8), 50.0), torch.full((2, 8), -50.0)

    def output(step: Tensor, steps: Tensor) -> Tensor:
        return op.int8_linear(x, weight, None, scheme, step, steps).sum()

    step, steps = torch.tensor(0.5, requires_grad=True), torch.tensor([[0.25], [0.75]], requires_grad=True)
    output(step, steps).backward()
    small = 1e-2
    with torch.no_grad():
        by_step = (output(step + small, steps) - output(step - small, steps)) / (2 * small)
        by_first = torch.tensor([[small], [0.0]])
        by_steps = (output(step, steps + by_first) - output(step, steps - by_first)) / (2 * small)
    assert step.grad is not None
    assert steps.grad is not None
    assert float(step.grad) == pytest.approx(float(by_step), rel=1e-3)
    assert float(steps.grad[0, 0]) == pytest.approx(float(by_steps), rel=1e-3)


def test_ends_of_a_range_with_a_zero_point_have_a_gradient() -> None:
    """Weights that lie on their least and largest code are within the range; one step further they are not."""
    scheme = Scheme(weight_bits=4, zero_point=True)
    zero = torch.tensor([[3.0]])
    weight = torch.tensor([[-3.0, 12.0, -4.0, 13.0, 0.0]], requires_grad=True)
    x = torch.ones(1, 5)
    op.int8_linear(x, weight, None, scheme, None, torch.ones(1, 1), zero).sum().backward()
    assert weight.grad is not None
    assert (weight.grad[0] != 0).tolist() == [True, True, False, False, True]


# -- 4-bit codes in bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [1, 2, 7, 64, 65])
def test_packing_symmetric_codes(inputs: int) -> None:
    codes = torch.randint(-8, 8, (5, inputs), dtype=torch.int8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, (inputs + 1) // 2)
    assert torch.equal(unpack(packed, inputs), codes)
    if inputs > 1:
        assert int(packed[2, 0]) == int(codes[2, 0] + 8) + 16 * int(codes[2, 1] + 8)  # the even one is low


@pytest.mark.parametrize("inputs", [3, 8])
def test_packing_with_offsets_of_their_own(inputs: int) -> None:
    offset = torch.randint(0, 16, (5, inputs), dtype=torch.int8)
    stored = torch.randint(0, 16, (5, inputs), dtype=torch.int8)
    codes = stored - offset  # -15 .. 15
    packed = pack(codes, offset)
    assert torch.equal(unpack(packed, inputs, offset), codes)
    assert torch.equal(unpack(packed, inputs, 0), stored)


def test_every_byte_is_used() -> None:
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    codes = torch.stack((low.flatten(), high.flatten()), dim=1).to(torch.int8) - 8
    assert sorted(pack(codes).flatten().tolist()) == list(range(256))
