"""Whole models calibrated: what is found, what is refused, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import UserError
from vit_efficient.quantization import calibrate as module
from vit_efficient.quantization.calibrate import Calibrated, calibrate, uncalibrated
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_attention import integer_attention
from vit_efficient.quantization.int8_layers import Int8Linear, Int8Patches

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    "no class token": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3, "class_token": False,
         "global_pool": "avg"},
    ),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 1, "embed_dim": 96, "num_heads": 3}),
    "eva02 split, gated": ("eva02_base_patch14_224", {"img_size": 28, "depth": 1, "embed_dim": 96, "num_heads": 3}),
    "eva02 fused": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1, "embed_dim": 96, "num_heads": 3}),
    "swiglu": ("vit_giant_patch14_dinov2", {"img_size": 28, "depth": 1, "embed_dim": 96, "num_heads": 3}),
    "rope": ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 1, "embed_dim": 96, "num_heads": 3}),
    "two heads": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3}),
}  # fmt: skip
STATIC = Int8Config(keep=("head",), activations="static")
QUICK = CalibrationConfig(importance=False, rounding="mse")


def plain(name: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    timm_name, kwargs = MODELS[name]
    model = timm.create_model(timm_name, num_classes=10, **kwargs)
    for parameter in model.parameters():  # a fresh model's zero biases and unit norms would hide what is done to them
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    swap_attention(model, SdpaConfig().build())
    return model.eval()


def quantized(config: Any = STATIC, name: str = "vit") -> nn.Module:
    model = plain(name)
    config.apply(model, compute_dtype=torch.float32)
    return model


def images(name: str = "vit", count: int = 32, seed: int = 1) -> list[Tensor]:
    size: int = MODELS[name][1]["img_size"]  # type: ignore[assignment]
    made = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return list(made.split(20))  # the last batch is smaller


def layers_of(model: nn.Module) -> dict[str, Int8Linear | Int8Patches]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (Int8Linear, Int8Patches))}


@torch.no_grad()
def distance(model: nn.Module, name: str = "vit", seed: int = 1) -> float:
    """Of the logits, relative to full precision."""
    batch = torch.cat(images(name, seed=seed))
    right = plain(name)(batch)
    return float((model(batch) - right).norm() / (right - right.mean(dim=0)).norm())


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_models_are_close_to_full_precision(name: str) -> None:
    """Every kind of model: each of its layers calibrated, also the patch embedding; on images not seen too."""
    model = quantized(STATIC.model_copy(update={"keep": ()}), name)
    assert len(list(uncalibrated(model))) == len(layers_of(model))
    done = calibrate(model, images(name), CalibrationConfig(observer="minmax"))
    assert done.images == 32
    assert [fit.name for fit in done.fits] == list(layers_of(model))
    assert not list(uncalibrated(model))
    assert distance(model, name) < 0.08
    assert distance(model, name, seed=2) < 0.3  # fitted to 32 images of noise
    assert all(0 < fit.error < 0.01 for fit in done.fits)
    STATIC.finalize(model)
    assert distance(model, name) < 0.08  # as it is deployed


@pytest.mark.parametrize(
    "config",
    [
        Int8Config(keep=("head",)),
        Int8Config(keep=("head",), weight_bits=4, group=32, zero_point=True),
        Int8Config(keep=("head",), activations="hybrid", weights="tensor"),
        Int4Config(keep=("patch_embed", "head"), type="int", group=32),
    ],
    ids=["dynamic", "W4A8 zero points", "hybrid, per tensor", "int4"],
)
def test_calibration_helps(config: Any) -> None:
    """Against rounding to nearest in the range of the largest magnitude, and no more."""
    bare = CalibrationConfig(
        observer="minmax", smooth=None, shift=False, rounding="nearest", bias_correction=False, importance=False
    )
    distances = []
    for own in (bare, CalibrationConfig(observer="mse")):
        model = quantized(config)
        calibrate(model, images(count=64), own)
        distances.append(distance(model))
    assert distances[1] < 0.9 * distances[0]


def test_layers_see_what_the_calibrated_ones_before_them_give() -> None:
    """Each block is calibrated on quantized inputs: the scale of the second block's first layer is that of its inputs
    in the finished model, and not in the float one."""
    config = CalibrationConfig(importance=False, smooth=None, shift=False, rounding="nearest", observer="minmax")
    model = quantized(STATIC.model_copy(update={"weight_bits": 4, "activation_bits": 4}))
    calibrate(model, images(), config)
    seen: list[Tensor] = []
    layer = model.blocks[1].attn.qkv
    handle = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        for batch in images():
            model(batch)
    handle.remove()
    largest = max(float(x.abs().max()) for x in seen)
    assert float(layer.input_scale) == pytest.approx(largest / 7, rel=1e-6)


def test_rows_are_left_out_evenly_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and their importance stay in step, over batches of any size."""
    model = quantized(STATIC)
    name = "blocks.0.mlp.fc1"
    batches = images(count=33)
    group = {name: layers_of(model)[name]}
    for layer in layers_of(model).values():
        layer.observing = True
    rows, step = module._inputs(model, group, batches)[name]
    assert (step, len(rows)) == (1, 33 * 17)
    monkeypatch.setattr(module, "ROWS_BYTES", rows.nbytes // 3)
    fewer, step = module._inputs(model, group, batches)[name]
    assert step == 3  # does not divide the 340 rows of the first batch
    torch.testing.assert_close(fewer, rows[::step])
    calibrate(model, batches, CalibrationConfig())
    assert distance(model) < 0.2


def test_the_same_twice() -> None:
    states = []
    for seed in (1, 2):
        model = quantized(STATIC.model_copy(update={"attention": "static"}))
        torch.manual_seed(seed)  # what was drawn before does not matter
        calibrate(model, images(), CalibrationConfig(views=2))
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_images_are_left_as_they_are() -> None:
    batches = images()
    before = [batch.clone() for batch in batches]
    calibrate(quantized(), batches, CalibrationConfig(views=2))
    assert all(torch.equal(a, b) for a, b in zip(batches, before, strict=True))
    assert not any(batch.requires_grad for batch in batches)


def test_more_views_change_the_result_and_not_the_count() -> None:
    one, two = quantized(), quantized()
    assert calibrate(one, images(), QUICK).images == 32
    assert calibrate(two, images(), QUICK.model_copy(update={"views": 3})).images == 32
    assert not torch.equal(one.blocks[0].mlp.fc2.input_scale, two.blocks[0].mlp.fc2.input_scale)


def test_progress_and_lines() -> None:
    seen: list[tuple[int, int]] = []
    done = calibrate(quantized(), images(), QUICK, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]  # the patch embedding, two blocks
    (line,) = done.lines()
    worst = max(done.fits, key=lambda fit: fit.error)
    assert line.startswith(f"calibrated on 32 images; largest output errors: {worst.name} {100 * worst.error:.2f} %, ")
    assert Calibrated(32).lines() == []


# -- what is left behind ----------------------------------------------------------------------------------------------


def traces(model: nn.Module) -> list[str]:
    """Hooks, flags and gradients that a finished calibration must not leave."""
    found = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    found += [name for name, m in model.named_modules() if getattr(m, "observing", False)]
    found += [name for name, m in model.named_modules() if "backend" in m.__dict__ and "Observed" in repr(m.backend)]
    return found + [name for name, parameter in model.named_parameters() if parameter.grad is not None]


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: m.training for name, m in model.named_modules()}


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_hooks_stay(training: bool) -> None:
    """Also of parts that are in another mode than the whole."""
    model = quantized(STATIC.model_copy(update={"attention": "static"})).train(training)
    model.norm.train(not training)
    mine = model.blocks[0].register_forward_hook(lambda module, arguments, output: None)
    requires = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = modes(model)
    calibrate(model, images(), CalibrationConfig())
    assert modes(model) == before
    assert len(model.blocks[0]._forward_hooks) == 1
    mine.remove()
    assert traces(model) == []
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == requires


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise UserError("on purpose")


@pytest.mark.parametrize("place", ["patch_embed", "blocks.0", "blocks.1", "norm"])
@pytest.mark.parametrize("attention", ["static", "none"])
def test_mode_and_hooks_stay_after_a_failure(place: str, attention: str) -> None:
    model = quantized(STATIC.model_copy(update={"attention": attention})).train()
    model.get_submodule(place).register_forward_pre_hook(lambda module, arguments: Fails()(arguments[0]))
    before = modes(model)
    with pytest.raises(UserError, match="on purpose"):
        calibrate(model, images(), CalibrationConfig())
    assert modes(model) == before
    model.get_submodule(place)._forward_pre_hooks.clear()
    assert traces(model) == []


# -- integer attention ------------------------------------------------------------------------------------------------


def test_static_attention_is_calibrated() -> None:
    config = STATIC.model_copy(update={"attention": "static"})
    model = quantized(config)
    done = calibrate(model, images(), CalibrationConfig(observer="minmax"))
    found = integer_attention(model)
    assert len(found) == 2
    for attend in found.values():
        assert attend.scales is not None
        assert all(0 < float(scale) < 1 for scale in attend.scales)
        assert not attend.observing
    assert distance(model) < 0.08
    assert done.fits


def test_float_values_are_given_no_scale() -> None:
    config = STATIC.model_copy(update={"attention": "static"})
    both = [quantized(config.model_copy(update={"attention_values": values})) for values in ("int8", "float")]
    for model in both:
        calibrate(model, images(), CalibrationConfig(observer="minmax"))
    for integer, floating in zip(*(integer_attention(model).values() for model in both), strict=True):
        assert dict(floating.named_buffers()).keys() == {"q_scale", "k_scale"}
        assert all(torch.equal(scale, integer.get_buffer(name)) for name, scale in floating.named_buffers())


def test_scales_of_attention_by_hand() -> None:
    """The largest magnitude of queries, keys and values in the float model, over 127."""
    model, right = quantized(STATIC.model_copy(update={"attention": "static"})), plain()
    calibrate(model, images(), QUICK.model_copy(update={"observer": "minmax"}))
    seen: list[Tensor] = []
    handle = right.blocks[0].attn.qkv.register_forward_hook(lambda module, arguments, output: seen.append(output))
    with torch.no_grad():
        for batch in images():
            right(batch)
    handle.remove()
    amax = torch.cat(seen).unflatten(-1, (3, -1)).abs().amax(dim=(0, 1, 3))
    attend = integer_attention(model)["blocks.0.attn"]
    torch.testing.assert_close(torch.stack(attend.scales), amax / 127, rtol=1e-5, atol=0)  # type: ignore[arg-type]


def test_nothing_to_calibrate() -> None:
    """A model without integer layers is left alone."""
    model = plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert calibrate(model, images(), CalibrationConfig()).fits == []
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_uncalibrated_layers_are_told() -> None:
    model = quantized(Int8Config(keep=("head",), activations="hybrid"))
    static = [f"blocks.{block}.{layer}" for block in range(2) for layer in ("attn.proj", "mlp.fc2")]
    assert list(uncalibrated(model)) == static
    with torch.no_grad():
        assert model(torch.cat(images())).isnan().all()  # it shows
    calibrate(model, images(), QUICK)
    assert list(uncalibrated(model)) == []
