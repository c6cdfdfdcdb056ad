"""Under every scheme what is trained is what is deployed, and gradients are those that the papers give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.kernels.int8_linear.op import dequantize_weight
from vit_efficient.kernels.int8_linear.reference import in_16_bits
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_layers import DeployedInt8, Int8Linear, Int8Patches, learn_scales, trainable

SIZE = 32
KEEP = ("head",)  # the patch embedding is quantized too
BITS = ((8, 8), (4, 8), (4, 4))
WEIGHTS = (
    {"weights": "channel"},
    {"weights": "tensor"},
    {"group": 32},  # the last group of 48 inputs is shorter
    {"group": 64},
    {"group": 32, "zero_point": True},
)
ACTIVATIONS = (
    {"activations": "dynamic", "dynamic_scale": "token"},
    {"activations": "dynamic", "dynamic_scale": "tensor"},
    {"activations": "static"},
    {"activations": "hybrid"},
)
# Attention and learned steps take turns over the schemes. There are seven turns, a number prime to the four kinds of
# activations, so each kind meets each turn.
TURNS = (
    ("none", False), ("dynamic", True), ("static", True), ("dynamic", False), ("none", True), ("static", False),
    ("static", True),
)  # fmt: skip


def schemes() -> Iterator[object]:
    turns = itertools.cycle(TURNS)
    for (weight_bits, activation_bits), weights, activations in itertools.product(BITS, WEIGHTS, ACTIVATIONS):
        if weight_bits == 8 and "zero_point" in weights:
            continue
        attention, learned = next(turns)
        bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        config = Int8Config(keep=KEEP, attention=attention, learn_scales=learned, **bits, **weights, **activations)
        own = "-".join(str(value) for value in (*weights.values(), *activations.values()))
        name = f"W{weight_bits}A{activation_bits}-{own}-attention_{attention}{'-learned' * learned}"
        yield pytest.param(config, id=name)


def plain_vit() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, depth=1, embed_dim=48, num_heads=3, num_classes=10
    )
    for parameter in model.parameters():  # zero biases and unit norms would hide what is done to them
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    swap_attention(model, SdpaConfig().build())
    return model


def trained_vit(config: Int8Config) -> nn.Module:
    """As a run trains it: calibrated where it must be, its steps learned where they are, and a little moved."""
    model = plain_vit()
    config.apply(model, compute_dtype=torch.float32)
    if config.needs_calibration:
        calibrate(model, [torch.randn(16, 3, SIZE, SIZE)], CalibrationConfig(importance=False, rounding="mse"))
        if config.learn_scales:
            learn_scales(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return model.train()


def deployed_vit(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    fresh = plain_vit()
    load_deployed(fresh, *deployed_state(model, dtype))
    return fresh.eval()


@pytest.mark.parametrize("config", schemes())
@torch.no_grad()
def test_training_logits_equal_deployed_logits_bit_for_bit(config: Int8Config) -> None:
    model = trained_vit(config)
    images = torch.randn(3, 3, SIZE, SIZE)
    logits = model(images)
    assert logits.isfinite().all()
    assert torch.equal(deployed_vit(model, torch.float32)(images), logits)
    with torch.autocast("cpu", torch.bfloat16):  # the float layers are stored as autocast rounds them
        assert torch.equal(deployed_vit(model, torch.bfloat16)(images), model(images))


@pytest.mark.parametrize("activations", ["static", "hybrid"])
def test_calibrated_layers_have_what_the_schemes_above_are_to_carry(activations: str) -> None:
    """Shift, smoothing and given steps are there: the equality above is not that of empty layers."""
    model = trained_vit(Int8Config(keep=KEEP, activations=activations, weight_bits=4, activation_bits=4))
    layers = [m for m in model.modules() if isinstance(m, (Int8Linear, Int8Patches))]
    static = [layer for layer in layers if layer.scheme.activations == "static"]
    assert len(static) == (5 if activations == "static" else 2)
    assert all(layer.shift is not None and layer.input_scale is not None for layer in static)
    assert any(layer.smooth is not None for layer in layers)
    assert all(layer.weight_scale is not None for layer in layers)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_learns_under_autocast(precision: torch.dtype) -> None:
    model = trained_vit(Int8Config(keep=KEEP, activations="hybrid", weight_bits=4, learn_scales=True))
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        model(torch.randn(3, 3, SIZE, SIZE)).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == parameter.dtype, name
        assert parameter.grad.isfinite().all(), name
        if "scale" in name:
            assert parameter.grad.any(), name


@torch.no_grad()
def test_a_fresh_model_takes_the_form_of_a_checkpoint() -> None:
    """And has its parameters in the same order, which is how an optimizer's state finds them again."""
    config = Int8Config(keep=KEEP, activations="hybrid", learn_scales=True)
    model, fresh = trained_vit(config), plain_vit()
    config.apply(fresh, compute_dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    images = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(fresh(images), model(images))


def test_a_layer_without_bias_takes_the_one_that_calibration_gave() -> None:
    own, fresh = (trainable(nn.Linear(8, 3, bias=False), Scheme(activations="static")) for _ in range(2))
    own.input_scale, own.shift, own.bias = torch.tensor(0.01), torch.randn(8), nn.Parameter(torch.randn(3))
    fresh.load_state_dict(own.state_dict())
    assert [name for name, _ in fresh.named_parameters()] == ["weight", "bias"]
    x = torch.randn(2, 8)
    assert torch.equal(fresh(x), own(x))


def test_a_checkpoint_that_lacks_a_range_is_refused() -> None:
    config = Int8Config(keep=KEEP, activations="static")
    state, fresh = trained_vit(config).state_dict(), plain_vit()
    config.apply(fresh, compute_dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"Missing.*blocks\.0\.mlp\.fc2\.input_scale"):
        fresh.load_state_dict({name: t for name, t in state.items() if name != "blocks.0.mlp.fc2.input_scale"})
    dynamic = plain_vit()
    Int8Config(keep=KEEP).apply(dynamic, compute_dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"Unexpected.*blocks\.0\.mlp\.fc2\.input_scale"):
        dynamic.load_state_dict(state)


# -- gradients, against autograd of the same thing in float64 ---------------------------------------------------------


def straight(x: Tensor, codes: Tensor) -> Tensor:
    """`codes` going forward, `x` going backward."""
    return codes.detach() + (x - x.detach())


def stepped(x: Tensor, step: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Equations 1 and 2 of LSQ; autograd of them, the rounding passed straight through, is its equations 3 and 5.

    What is rounded to the last code counts as within the range, as the forward rounds first.
    """
    codes = (x / step).detach().round()
    inside = (codes >= low) & (codes <= high)  # not `clamp`, which halves the gradient of what lies on its bound
    return (
        torch.where(inside, straight(x / step, codes), codes.clamp(torch.as_tensor(low), torch.as_tensor(high))) * step
    )


GRADIENTS = {
    "token": Scheme(),
    "tensor": Scheme(activations="tensor", weights="tensor"),
    "static": Scheme(activations="static", activation_bits=4),
    "groups": Scheme(weight_bits=4, group=20, activations="static"),
    "zero points": Scheme(weight_bits=4, group=20, zero_point=True),
}


@pytest.mark.parametrize("learned", [False, True], ids=["largest magnitude", "learned"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name: str, learned: bool) -> None:
    """Of the input, the weight, the bias and both steps; values beyond a given range have none."""
    torch.manual_seed(0)
    scheme = GRADIENTS[name]
    layer = trainable(nn.Linear(50, 7), scheme)
    assert isinstance(layer, Int8Linear)
    if scheme.activations == "static":
        layer.input_scale = torch.tensor(2.0 / scheme.largest_activation)  # of normal values 5 % lie beyond 2
    if learned:
        layer.learn_scales()
        with torch.no_grad():
            layer.log_weight_scale -= 0.3  # so that some weights lie beyond their range
    x, towards = torch.randn(30, 50, requires_grad=True), torch.randn(30, 7)
    y = layer(x)
    y.backward(towards)

    deployed = layer.to_deployed()
    limit = scheme.largest_activation
    codes, rows = (tensor.double() for tensor in layer.codes(x))
    x64, weight, bias = (t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias))
    steps = {}
    if scheme.activations == "static" and learned:
        steps["log_input_scale"] = layer.log_input_scale.detach().double().requires_grad_()
        seen = stepped(x64, steps["log_input_scale"].exp(), -limit, limit)
    elif scheme.activations == "static":
        seen = stepped(x64, layer.input_scale.double(), -limit, limit)
    else:
        seen = straight(x64, codes * rows)
    if learned:
        steps["log_weight_scale"] = layer.log_weight_scale.detach().double().requires_grad_()
        scale = steps["log_weight_scale"].exp()
        if scheme.group is not None:
            scale = straight(scale, in_16_bits(layer.log_weight_scale.detach().exp()).double())
        low, high = torch.tensor(-scheme.largest_weight), torch.tensor(scheme.largest_weight)
        if layer.weight_zero is not None:
            low, high = -layer.weight_zero, 15 - layer.weight_zero
        if scheme.group is not None:
            scale = scale.repeat_interleave(scheme.group, dim=1)[:, :50]
        if low.ndim:
            low, high = (end.repeat_interleave(20, dim=1)[:, :50] for end in (low, high))
        rounded = stepped(weight, scale, low, high)
    else:
        rounded = straight(
            weight, dequantize_weight(deployed.weight_codes(), deployed.weight_scale.float(), scheme, torch.float64)
        )
    expected = seen @ rounded.T + bias
    expected.backward(towards.double())

    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    pairs = {"x": (x, x64), "weight": (layer.weight, weight), "bias": (layer.bias, bias)}
    pairs |= {key: (getattr(layer, key), step) for key, step in steps.items()}
    for key, (own, right) in pairs.items():
        assert own.grad is not None, key
        assert right.grad is not None, key
        difference = (own.grad.double() - right.grad).norm() / right.grad.norm()
        assert difference < 1e-5, f"{key}: {difference}"
    if scheme.activations == "static":
        beyond = x.abs() > 2 * (limit + 0.5) / limit
        assert beyond.any()
        assert not x.grad[beyond].any()
        assert x.grad[~beyond].all()
    assert isinstance(deployed, DeployedInt8)
