"""One call: a timm model becomes a quantized one that is used, exported and saved as it was."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vit_efficient
from vit_efficient import quantize_model
from vit_efficient.errors import CapabilityError, RecipeError, UserError
from vit_efficient.model.fused import FusedBlock
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_deployed import DeployedInt8
from vit_efficient.recipe.load import load_recipe

STATIC = {"name": "int8", "activations": "static"}


def small(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    return timm.create_model(name, **{**arguments, **kwargs}).eval()


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def error(model: nn.Module, wanted: Tensor) -> float:
    with torch.no_grad():
        return float((model(images().to(next(model.parameters()).dtype)).float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("recipe", "bound"),
    [
        ("int8_sdpa", 0.03),
        ("fp8_sdpa", 0.06),
        ("w4a8_sdpa", 0.3),
        ("int8_flash2", None),
        ({"name": "int8", "dynamic_scale": "tensor"}, 0.05),
        ({"quantization": {"name": "int8", "attention": "dynamic"}, "attention": "sdpa"}, 0.05),
        (Int8Config(keep=("patch_embed", "head", "first_block")), 0.03),
    ],
    ids=str,
)
def test_recipes_in_all_forms(recipe: Any, bound: float | None) -> None:
    model = small()
    with torch.no_grad():
        wanted = model(images())
    if bound is None:
        with pytest.raises(CapabilityError, match=r"`attention: flash2` cannot run: .* on the CPU"):
            quantize_model(model, recipe)
        return
    quantized = quantize_model(model, recipe)
    assert 0 < error(quantized, wanted) < bound
    assert any(isinstance(module, FusedBlock) for module in quantized.modules())
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert not quantized.training
    assert error(model, wanted) == 0  # the caller's model is as it was
    assert not any(isinstance(module, DeployedInt8) for module in model.modules())


@pytest.mark.parametrize("scheme", [{"name": "int8", "attention": "dynamic"}, {"name": "fp8", "attention": "fp8"}])
def test_the_attention_of_a_quantization_is_no_section(scheme: dict[str, str]) -> None:
    alone, in_a_section = quantize_model(small(), scheme), quantize_model(small(), {"quantization": scheme})
    assert alone(images()).equal(in_a_section(images()))
    assert not alone(images()).equal(quantize_model(small(), {"name": scheme["name"]})(images()))


def test_a_recipe_object_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("protocol: digits\nattention: sdpa\nquantization: {name: int8, weights: tensor}\n")
    by_file = quantize_model(small(), str(file))
    by_object = quantize_model(small(), load_recipe(str(file)).recipe)
    assert by_file(images()).equal(by_object(images()))
    assert by_file.blocks[0].attn.qkv.weight_scale.shape == (1, 1)


def test_group_scales_of_four_bits_are_calibrated() -> None:
    with torch.no_grad():
        wanted = small()(images())
    quantized = quantize_model(small(), "int4_group_sdpa", calibration=images(32))
    assert 0 < error(quantized, wanted) < 0.2


@pytest.mark.parametrize("form", ["tensor", "batches", "pairs"])
def test_calibration_images_in_all_forms(form: str) -> None:
    model = small()
    seen = images(32)
    given: Any = {"tensor": seen, "batches": seen.split(8), "pairs": [(one, torch.zeros(8)) for one in seen.split(8)]}
    quantized = quantize_model(model, STATIC, calibration=given[form])
    with torch.no_grad():
        wanted = model(images())
    assert error(quantized, wanted) < 0.1


def test_no_more_images_are_read_than_asked_for() -> None:
    def endless() -> Any:
        for _ in range(3):
            yield images(8)
        raise AssertionError("read on")

    quantize_model(small(), {**STATIC, "calibration": {"samples": 20, "importance": False}}, calibration=endless())


def test_in_place_and_dtype() -> None:
    model = small().to(torch.bfloat16)
    with torch.no_grad():
        wanted = model(images().bfloat16()).float()
    same = quantize_model(model, "int8_sdpa", inplace=True)
    assert same is model
    assert model.patch_embed.proj.weight.dtype == torch.bfloat16
    assert model.blocks[0].attn.qkv.weight_scale.dtype == torch.float32
    assert error(model, wanted) < 0.05


def test_without_fusing_the_blocks_are_timms() -> None:
    plain, fused = quantize_model(small(), "int8_sdpa", fuse=False), quantize_model(small(), "int8_sdpa")
    assert not any(isinstance(module, FusedBlock) for module in plain.modules())
    assert plain(images()).equal(fused(images()))
    assert list(plain.state_dict()) == list(fused.state_dict())


def test_what_was_done_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vit_efficient")
    quantize_model(small(), {"name": "int8", "keep": ["patch_embed", "head", "blocks.1.attn.proj"]})
    assert "1 of 2 blocks fused" in caplog.messages
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["not fused: blocks.1: attn.proj is kept in floating point"]
    assert any(message.startswith("int8: 7 of ") for message in caplog.messages)


def test_timms_own_methods_go_on_working() -> None:
    model, quantized = small(), quantize_model(small(), "int8_sdpa")
    with torch.no_grad():
        features = quantized.forward_features(images())
        assert features.shape == model.forward_features(images()).shape
        assert quantized.forward_head(features).equal(quantized(images()))
        final, taken = quantized.forward_intermediates(images(), indices=[0, 1])
    assert final.equal(features)
    assert len(taken) == 2


@pytest.mark.parametrize("recipe", ["int8_sdpa", "fp8_sdpa", STATIC, "int4_group_sdpa"], ids=str)
def test_export_and_load_again(recipe: Any, tmp_path: Path) -> None:
    needs = recipe in (STATIC, "int4_group_sdpa")
    quantized = quantize_model(small(), recipe, calibration=images(16) if needs else None)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(quantized, (images(),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for count in (1, 4, 9):
        with torch.no_grad():
            assert loaded(images(count)).equal(quantized(images(count)))


REFUSALS: list[tuple[Any, dict[str, Any], type[UserError], str]] = [
    (STATIC, {}, UserError, "is calibrated on images, and none were given. Pass calibration="),
    ("int8_static_sdpa", {}, UserError, "int8_sdpa"),
    ("int8_sdpa", {"calibration": images()}, UserError, "reads none"),
    (STATIC, {"calibration": images(4)}, UserError, "4 images are too few.*Pass more as calibration="),
    ({**STATIC, "calibration": {"samples": 8}}, {"calibration": images(32)}, UserError, r"calibration\.samples is 8"),
    (STATIC, {"calibration": [images(32).mul(50).byte()]}, UserError, "are uint8. Give them .* normalised"),
    (STATIC, {"calibration": [(images(32).long(), 0)]}, UserError, "are int64"),
    (STATIC, {"calibration": images(32) / 0}, UserError, "hold a NaN or an infinity. Check how"),
    (STATIC, {"calibration": torch.zeros(32, 3, 48, 32)}, UserError, "are 48 x 32 pixels, and the model takes 32 x 32"),
    (STATIC, {"calibration": [torch.zeros(3, 32, 32)]}, UserError, r"got \(3, 32, 32\)"),
    ("fp32_sdpa", {}, UserError, "quantization is none"),
    ("int9_sdpa", {}, RecipeError, "did you mean 'int8_sdpa'"),
    ("int9_sdpa", {}, RecipeError, r"^1 mistake in the recipe\n  recipe: there is no variant 'int9_sdpa'"),
    ("cifar10", {}, RecipeError, r"recipe: 'cifar10' is a protocol, not a variant\n"),
    (STATIC, {"calibration": 3}, UserError, "`calibration` is a int; give images"),
    (STATIC, {"calibration": torch.tensor(3.0)}, UserError, r"got \(\)"),
    (STATIC, {"calibration": [()]}, UserError, "got tuple"),
    (STATIC, {"calibration": torch.zeros(32, 1, 32, 32)}, UserError, r"have 1 channel\(s\), and the model takes 3"),
    ({"name": "int8", "bits": 8}, {}, RecipeError, r"quantization\.bits: int8 has no key 'bits', only torchao"),
    (
        {"name": "int8", "activation": "static"},
        {},
        RecipeError,
        r"quantization\.activation: unknown key(.|\n)*did you mean 'quantization\.activations'",
    ),
    (
        {"quantization": {"name": "int8", "activations": "statik"}},
        {},
        RecipeError,
        r"quantization\.activations: must be one of(.|\n)*did you mean 'static'",
    ),
    ({"name": "int9"}, {}, RecipeError, r"quantization\.name: unknown quantization backend 'int9'"),
    ({"name": "int8", "zero_point": True}, {}, RecipeError, r"quantization\.zero_point: is for"),
    ({"quantization": "int8", "optim": {}}, {}, RecipeError, "optim: is not read here"),
    (8, {}, UserError, "not a int"),
    ({"name": "int8", "keep": "auto"}, {}, UserError, "keep=auto is chosen on calibration images"),
]


@pytest.mark.parametrize(("recipe", "options", "kind", "text"), REFUSALS, ids=[case[3] for case in REFUSALS])
def test_refusals(recipe: Any, options: dict[str, Any], kind: type[UserError], text: str) -> None:
    with pytest.raises(kind, match=text):
        quantize_model(small(), recipe, **options)


@pytest.mark.parametrize("name", ["blocks.1.mlp.fc2.weight", "head.bias"])
def test_a_weight_that_is_no_number(name: str) -> None:
    model = small()
    model.get_parameter(name).data.view(-1)[1] = float("nan")
    with pytest.raises(UserError, match=f"`{name}` holds a NaN or an infinity"):
        quantize_model(model, "int8_sdpa")


def test_models_that_cannot_be_quantized() -> None:
    with pytest.raises(UserError, match="has no attention"):
        quantize_model(nn.Sequential(nn.Linear(4, 4)), "int8_sdpa")
    with pytest.raises(UserError, match="is quantized already"):
        quantize_model(quantize_model(small(), "int8_sdpa"), "int8_sdpa")
    with pytest.raises(UserError, match="compile the result"):
        quantize_model(torch.compile(small()), "int8_sdpa")  # type: ignore[arg-type]
    mixed = small()
    mixed.head.to(torch.bfloat16)
    with pytest.raises(UserError, match="bfloat16, float32; they must be of one dtype"):
        quantize_model(mixed, "int8_sdpa")


def test_what_is_no_model() -> None:
    with pytest.raises(UserError, match="`model` is a NoneType; give a Vision Transformer of timm"):
        quantize_model(None, "int8_sdpa")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`model`, a Identity, has no parameters"):
        quantize_model(nn.Identity(), "int8_sdpa")


class Wrapper(nn.Module):
    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x)


@pytest.mark.parametrize(
    ("recipe", "options", "text"),
    [
        ("int8_sdpa", {}, "Wrapper has no `blocks`.*`fuse=False`"),
        (STATIC, {"calibration": images(4), "fuse": False}, "4 images are too few"),
    ],
    ids=["blocks", "images"],
)
def test_a_refusal_leaves_the_model_as_it_was(recipe: Any, options: dict[str, Any], text: str) -> None:
    model = Wrapper(small().to(torch.bfloat16)).train()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=text):
        quantize_model(model, recipe, inplace=True, **options)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert model.training
    assert {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()} == {(torch.bfloat16, True)}


def test_a_wrapped_model_is_quantized_without_fusing() -> None:
    model = Wrapper(small())
    assert quantize_model(model, "int8_sdpa", fuse=False)(images()).equal(
        quantize_model(model.vit, "int8_sdpa", fuse=False)(images())
    )


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, vit_efficient; assert 'torch' not in sys.modules; assert 'quantize_model' in dir(vit_efficient)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert vit_efficient.quantize_model is quantize_model
    with pytest.raises(AttributeError, match="no attribute 'quantise_model'"):
        vit_efficient.quantise_model  # noqa: B018


def test_nothing_is_printed_of_kernels_that_are_not_used() -> None:
    """bitsandbytes, peft and torchao have much to say when they are imported; a process of its own imports them."""
    code = (
        "import timm, vit_efficient; sizes = dict(embed_dim=48, depth=1, num_heads=3, num_classes=5); "
        "vit_efficient.quantize_model(timm.create_model('vit_tiny_patch16_224', **sizes).eval(), 'int4_sdpa')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
