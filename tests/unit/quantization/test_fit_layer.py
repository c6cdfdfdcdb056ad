"""One layer calibrated: what moves between the parts of a layer leaves its float function as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.errors import UserError
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.fit_layer import EXPONENTS, fit_layer
from vit_efficient.quantization.int8_layers import Int8Linear, Int8Patches, to_patches, trainable

INPUTS, OUTPUTS = 40, 12
STATIC = Scheme(activations="static")
SCHEMES = {
    "W8A8 token": Scheme(),
    "W8A8 tensor": Scheme(weights="tensor", activations="tensor"),
    "W8A8 static": STATIC,
    "W4A8 groups": Scheme(weight_bits=4, group=32),  # 32 and 8 inputs
    "W4A4 static": Scheme(weight_bits=4, activation_bits=4, activations="static"),
    "W4 zero points": Scheme(weight_bits=4, group=32, zero_point=True, activations="none"),
}
NOTHING = CalibrationConfig(
    observer="minmax", smooth=None, shift=False, rounding="nearest", bias_correction=False, importance=False
)


def layer_of(scheme: Scheme, *, bias: bool = True, seed: int = 0) -> Int8Linear:
    torch.manual_seed(seed)
    made = trainable(nn.Linear(INPUTS, OUTPUTS, bias=bias), scheme)
    assert isinstance(made, Int8Linear)
    return made


def rows(count: int = 600, seed: int = 1) -> Tensor:
    """As a ViT's: channels off centre, a few of them far larger than the others, and correlated."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=generator) @ (
        torch.eye(INPUTS) + 0.1 * torch.randn(INPUTS, INPUTS, generator=generator)
    )
    size = torch.ones(INPUTS)
    size[::9] = 12
    return (x + 0.8 * torch.randn(INPUTS, generator=generator)) * size


def floating(layer: Int8Linear | Int8Patches, tokens: Tensor) -> Tensor:
    """What the layer computes but for all rounding."""
    return F.linear(layer.smoothed(tokens), layer.weight.flatten(1), layer.bias)


def relative(own: Tensor, right: Tensor) -> float:
    return float((own - right).norm() / right.norm())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("smooth", [None, 0.3, 1.0, "auto"])
@pytest.mark.parametrize("bias", [True, False])
def test_float_function_stays(name: str, smooth: float | str | None, bias: bool) -> None:
    """Smoothing and shift move between inputs, weight and bias, and nothing is lost on the way."""
    layer, x = layer_of(SCHEMES[name], bias=bias), rows()
    before = F.linear(x, layer.weight, layer.bias).detach()
    config = NOTHING.model_copy(update={"smooth": smooth, "shift": True})
    found = fit_layer("x", layer, x, None, config)
    assert (layer.smooth is not None) == (found.exponent is not None)
    if smooth != "auto":
        assert found.exponent == smooth
    assert (layer.shift is not None) == (layer.scheme.activations == "static")
    assert relative(floating(layer, x), before) < 1e-5
    new = rows(seed=2)  # of any input, not of those seen only
    torch.manual_seed(0)
    fresh = layer_of(SCHEMES[name], bias=bias)
    assert relative(floating(layer, new), F.linear(new, fresh.weight, fresh.bias)) < 1e-5


def test_shift_is_the_middle_and_moves_into_the_bias_exactly() -> None:
    layer, x = layer_of(STATIC), rows()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    fit_layer("x", layer, x, None, NOTHING.model_copy(update={"shift": True}))
    assert layer.shift is not None
    torch.testing.assert_close(layer.shift, (x.amax(dim=0) + x.amin(dim=0)) / 2)
    assert torch.equal(layer.bias, bias + weight @ layer.shift)
    assert torch.equal(layer.weight, weight)
    # The range is then that of the centred inputs.
    assert float(layer.input_scale) == pytest.approx(float((x - layer.shift).abs().max()) / 127)


def test_smoothing_is_the_formula() -> None:
    """SmoothQuant's equation 4, but for one common factor; AWQ's where activations are not quantized."""
    x = rows()
    for scheme, exponent in itertools.product((STATIC, SCHEMES["W4 zero points"]), (0.25, 0.5)):
        layer = layer_of(scheme)
        weight = layer.weight.detach().clone()
        fit_layer("x", layer, x, None, NOTHING.model_copy(update={"smooth": exponent}))
        assert layer.smooth is not None
        by_hand = x.abs().amax(dim=0) ** exponent / weight.abs().amax(dim=0) ** (1 - exponent)
        if scheme.activations == "none":
            by_hand = x.abs().mean(dim=0) ** exponent
        ratio = layer.smooth / by_hand
        torch.testing.assert_close(ratio, ratio[0].expand(INPUTS), rtol=1e-4, atol=0)
        assert float(layer.smooth.log().mean()) == pytest.approx(0, abs=1e-5)


def test_channels_that_are_never_used_are_not_smoothed() -> None:
    layer, x = layer_of(STATIC), rows()
    x[:, 3] = 0
    with torch.no_grad():
        layer.weight[:, 5] = 0
    fit_layer("x", layer, x, None, NOTHING.model_copy(update={"smooth": 0.5}))
    assert layer.smooth is not None
    assert layer.smooth[3] == layer.smooth[5] == 1
    assert layer.smooth.isfinite().all()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_correction_leaves_no_mean_error(name: str, weighted: bool, bias: bool) -> None:
    """Of the integer layer itself, on the rows that it was calibrated with, as they count."""
    layer, x = layer_of(SCHEMES[name], bias=bias), rows()
    counts = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) if weighted else torch.ones(len(x))
    target = F.linear(x, layer.weight, layer.bias).detach()

    def mean_error(correction: bool) -> Tensor:
        own = layer_of(SCHEMES[name], bias=bias)
        config = NOTHING.model_copy(update={"bias_correction": correction, "rounding": "mse"})
        fit_layer("x", own, x, counts if weighted else None, config)
        return counts @ (own(x).detach() - target) / counts.sum()

    plain, corrected = mean_error(False), mean_error(True)
    assert corrected.abs().max() < 1e-4 * target.abs().max()
    assert corrected.norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_chosen_exponent_is_the_best_of_all(name: str, weighted: bool) -> None:
    """And so never worse than none, by the error of the layer itself. (As searched: weights rounded to nearest.)"""
    scheme, x = SCHEMES[name], rows()
    counts = torch.rand(len(x), generator=torch.Generator().manual_seed(2)) if weighted else None

    def error(smooth: object) -> float:
        layer = layer_of(scheme)
        target = F.linear(x, layer.weight, layer.bias).detach()
        found = fit_layer("x", layer, x, counts, NOTHING.model_copy(update={"smooth": smooth}))
        squares = (layer(x).detach() - target).square().sum(dim=1)
        power = target.square().sum(dim=1)
        weights = torch.ones(len(x)) if counts is None else counts
        own = float((weights @ squares) / (weights @ power))
        assert found.error == pytest.approx(own, rel=0.01)  # what it says of itself is what it does
        return own

    auto, none = error("auto"), error(None)
    assert auto <= none * (1 + 1e-6)
    if scheme.activations != "none":
        assert auto <= min(error(exponent) for exponent in EXPONENTS) * (1 + 1e-6)
        if scheme.activations == "static":
            assert auto < 0.5 * none  # with channels of such different sizes it is worth a lot


@pytest.mark.parametrize("name", SCHEMES)
def test_each_decision_helps(name: str) -> None:
    """The error of the defaults is below that of plain rounding, on the rows seen and on others."""
    scheme, x, new = SCHEMES[name], rows(2000), rows(2000, seed=1)
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(0))] * 0.9
    errors = []
    for config in (NOTHING, CalibrationConfig(observer="mse")):
        layer = layer_of(scheme)
        targets = [F.linear(part, layer.weight, layer.bias).detach() for part in (x, new)]
        fit_layer("x", layer, x, None, config)
        errors.append([relative(layer(part).detach(), target) for part, target in zip((x, new), targets, strict=True)])
    (plain, plain_new), (own, own_new) = errors
    assert own < 0.95 * plain
    assert own_new < plain_new


def test_given_steps_reproduce_the_rounded_weight() -> None:
    """The weight that is left lies on the codes: rounding it once more changes nothing."""
    for name in ("W8A8 static", "W4A8 groups", "W4 zero points"):
        for rounding in ("mse", "gptq"):
            layer, x = layer_of(SCHEMES[name]), rows()
            fit_layer("x", layer, x, None, NOTHING.model_copy(update={"rounding": rounding}))
            assert layer.weight_scale is not None
            assert (layer.weight_zero is not None) == layer.scheme.zero_point
            deployed = layer.to_deployed()
            step = deployed.weight_scale.float().repeat_interleave(layer.scheme.group or INPUTS, dim=1)[:, :INPUTS]
            rtol = 1e-6 if layer.scheme.group is None else 2**-8  # steps of groups are bfloat16
            torch.testing.assert_close(deployed.weight_codes() * step, layer.weight.detach(), rtol=rtol, atol=1e-8)
            with torch.no_grad():
                assert torch.equal(deployed(x), layer(x))


def test_rows_that_do_not_count_are_given_up() -> None:
    """Half of the rows point one way, half another; those of weight 0 may be wrong."""
    scheme = Scheme(weight_bits=4)
    x = rows(400)
    x[:200, :20], x[200:, 20:] = 0, 0
    counts = torch.cat((torch.ones(200), torch.zeros(200)))
    config = NOTHING.model_copy(update={"rounding": "gptq"})
    errors = {}
    for key, weight_T in (("first", counts), ("alike", None)):
        layer = layer_of(scheme)
        target = F.linear(x, layer.weight, layer.bias).detach()
        fit_layer("x", layer, x, weight_T, config)
        errors[key] = (layer(x).detach() - target).square().sum(dim=1).view(2, 200).mean(dim=1)
    assert errors["first"][0] < errors["alike"][0]
    assert errors["first"][1] > errors["alike"][1]


def test_patches() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 4, 4)
    images = torch.randn(20, 3, 16, 16)
    target = convolution(images).detach()
    layer = trainable(convolution, STATIC)
    assert isinstance(layer, Int8Patches)
    tokens = to_patches(images, (4, 4))[0].reshape(-1, 48)
    found = fit_layer("x", layer, tokens, None, CalibrationConfig())
    assert layer.weight.shape == (8, 3, 4, 4)
    assert relative(layer(images).detach(), target) < 0.03
    assert found.error < 0.001


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    x = rows()
    x[17, 3] = bad
    with pytest.raises(UserError, match="NaN or an infinity"):
        fit_layer("x", layer_of(SCHEMES[name]), x, None, CalibrationConfig())


@pytest.mark.parametrize("name", SCHEMES)
def test_no_inputs_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="saw no activations"):
        fit_layer("x", layer_of(SCHEMES[name]), torch.empty(0, INPUTS), None, CalibrationConfig())


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    layer = layer_of(SCHEMES[name])
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"weight.*NaN or an infinity"):
        fit_layer("x", layer, rows(), None, CalibrationConfig())


@pytest.mark.parametrize("name", SCHEMES)
def test_a_refused_layer_is_left_as_it_was(name: str) -> None:
    layer, x = layer_of(SCHEMES[name]), rows()
    x[17, 3] = float("nan")
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(UserError):
        fit_layer("x", layer, x, None, CalibrationConfig())
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) or before[key].isnan().all() for key in before)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_constant(name: str, value: float) -> None:
    """Is told apart where its range is not known, and does no harm where it need not be."""
    layer = layer_of(SCHEMES[name])
    x = torch.full((50, INPUTS), value)
    target = F.linear(x, layer.weight, layer.bias).detach()
    found = fit_layer("x", layer, x, None, CalibrationConfig())
    static = layer.scheme.activations == "static"
    assert found.constant == (static or value == 0)
    assert layer(x).isfinite().all()
    torch.testing.assert_close(layer(x).detach(), target, rtol=0.01, atol=1e-3)


def test_a_weight_of_zeros() -> None:
    layer = layer_of(STATIC)
    nn.init.zeros_(layer.weight)
    fit_layer("x", layer, rows(), None, CalibrationConfig())
    torch.testing.assert_close(layer(rows()), layer.bias.expand(600, OUTPUTS))
