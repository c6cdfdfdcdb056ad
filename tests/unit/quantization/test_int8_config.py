"""The keys of the integer schemes: what they make of each layer, and what is said of those that exclude each other."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import RecipeError
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_attention import integer_attention
from vit_efficient.quantization.int8_layers import DeployedInt8, Int8Linear, Int8Patches
from vit_efficient.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("words", "path", "text"),
    [
        ("weights=tensor group=64", "group", "is for quantization.weights=channel, and that is tensor"),
        ("group=48", "group", "must be one of 32, 64, 128 or null, got 48"),
        ("zero_point=true", "zero_point", "is for quantization.weight_bits=4 with quantization.weights=channel"),
        ("weight_bits=4 weights=tensor zero_point=true", "zero_point", "with quantization.weights=channel"),
        ("weight_bits=2", "weight_bits", "must be one of 8, 4, got 2"),
        ("activations=static dynamic_scale=tensor", "dynamic_scale", "static has no dynamic scale; leave it out"),
        ("freeze_ranges=0.3", "freeze_ranges", "is for quantization.learn_scales=true"),
        ("learn_scales=true freeze_ranges=1.5", "freeze_ranges", "must be a number from 0 to 1, got 1.5"),
        ("budget={max_drop: 1}", "budget", "is for `keep: auto`, and quantization.keep is a list"),
        ("calibration={samples: 0}", "calibration.samples", "must be a whole number of at least 1, got 0"),
        ("calibration={percentile: 40}", "calibration.percentile", "above 50 and of at most 100, got 40"),
        ("calibration={observer: minmx}", "calibration.observer", "must be one of minmax, percentile, mse, entropy"),
        ("calibration={smooth: 2}", "calibration.smooth", "is an exponent from 0 to 1, `auto` or null, and not 2"),
        ("calibration={smooth: -0.1}", "calibration.smooth", "and not -0.1"),
        ("calibration={smooth: atuo}", "calibration.smooth", "or auto or null, got 'atuo'"),
        ("calibration={smoth: 0.5}", "calibration.smoth", "smoth"),
        ("attention=float", "attention", "must be one of none, dynamic, static, got 'float'"),
        ("attention_values=float", "attention_values", "is float, and quantization.attention=none attends in floating"),
        ("attention_keys=block", "attention_keys", "is block, and quantization.attention=none attends in floating"),
        ("attention=static attention_keys=block", "attention_keys", "=static has one calibrated scale; leave one out"),
        ("attention=dynamic attention_values=bf16", "attention_values", "must be one of int8, float, fp8, got 'bf16'"),
    ],
)
def test_int8_keys_that_are_wrong(words: str, path: str, text: str) -> None:
    refused("int8", words, path, text)


@pytest.mark.parametrize(
    ("words", "path", "text"),
    [
        (
            "type=int lora={rank: 4}",
            "lora",
            "is for nf4 and fp4, and quantization.type is int, which takes no adapters",
        ),
        ("type=int train=critical", "train", "is for adapters, and quantization.lora is unset"),
        ("type=int double_quant=false", "double_quant", "is for nf4 and fp4, and quantization.type is int"),
        ("group=32", "group", "is for quantization.type=int, and that is nf4; leave it out"),
        ("zero_point=false", "zero_point", "is for quantization.type=int, and that is nf4; leave it out"),
        ("type=fp4 calibration={}", "calibration", "is for quantization.type=int, and that is fp4; leave it out"),
        ("type=nf5", "type", "must be one of nf4, fp4, int, got 'nf5'"),
        ("type=int group=16", "group", "must be one of 32, 64, 128, got 16"),
    ],
)
def test_int4_keys_that_are_wrong(words: str, path: str, text: str) -> None:
    refused("int4", words, path, text)


def refused(backend: str, words: str, path: str, text: str) -> None:
    overrides = [f"quantization.{word}" for word in split(words)]
    with pytest.raises(RecipeError) as caught:
        load_recipe("int8_sdpa", [f"quantization={backend}", *overrides])
    (problem,) = caught.value.problems
    assert problem.path == f"quantization.{path}"
    assert text in str(problem)
    assert problem.origin in ("command line", "")


def split(words: str) -> list[str]:
    """At spaces outside braces."""
    found: list[str] = []
    for word in words.split():
        if found and found[-1].count("{") > found[-1].count("}"):
            found[-1] += f" {word}"
        else:
            found.append(word)
    return found


def test_mistakes_are_told_together() -> None:
    words = ["quantization.zero_point=true", "quantization.freeze_ranges=0.5", "quantization.weights=tnsor"]
    with pytest.raises(RecipeError) as caught:
        load_recipe("int8_sdpa", words)
    paths = {problem.path for problem in caught.value.problems}
    assert paths >= {"quantization.weights", "quantization.freeze_ranges"}


def test_integers_take_no_adapters_unasked() -> None:
    for words in ([], ["quantization.lora=null"]):
        config = load_recipe("int8_sdpa", ["quantization=int4", "quantization.type=int", *words]).recipe.quantization
        assert config.lora is None  # type: ignore[union-attr]
    assert load_recipe("int8_sdpa", ["quantization=int4"]).recipe.quantization.lora is not None  # type: ignore[union-attr]
    assert Int4Config(type="int").lora is None
    assert Int4Config.model_validate_json(Int4Config(type="int").model_dump_json()) == Int4Config(type="int")
    full = Int8Config(calibration={"smooth": 0.5, "rounding": "mse"}, weight_bits=4, group=32, zero_point=True)
    assert Int8Config.model_validate_json(full.model_dump_json()) == full


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        (Int8Config(), False),
        (Int8Config(dynamic_scale="tensor", attention="dynamic"), False),
        (Int8Config(calibration={}), True),
        (Int8Config(activations="static"), True),
        (Int8Config(activations="hybrid"), True),
        (Int8Config(attention="static"), True),
        (Int4Config(), False),
        (Int4Config(type="int"), True),
    ],
    ids=str,
)
def test_which_need_images(config: Int8Config | Int4Config, needed: bool) -> None:
    assert config.needs_calibration == needed


def made(config: Int8Config | Int4Config) -> nn.Module:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=48, num_heads=3, num_classes=10
    )
    swap_attention(model, SdpaConfig().build())
    config.apply(model, compute_dtype=torch.float32)
    return model


def schemes(config: Int8Config | Int4Config) -> dict[str, Scheme]:
    found = made(config).named_modules()
    return {name: module.scheme for name, module in found if isinstance(module, (Int8Linear, Int8Patches))}


def test_schemes_of_layers() -> None:
    """`hybrid` is static where a fused kernel quantizes what another one gives: into proj and fc2 only."""
    hybrid = schemes(Int8Config(keep=(), activations="hybrid", weight_bits=4, group=64, dynamic_scale="tensor"))
    static = {"blocks.0.attn.proj", "blocks.0.mlp.fc2"}
    assert set(hybrid) == static | {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc1", "head"}
    for name, scheme in hybrid.items():
        expected = Scheme(weight_bits=4, group=64, activations="static" if name in static else "tensor")
        assert scheme == expected, name
    assert set(schemes(Int8Config(activations="static")).values()) == {Scheme(activations="static")}
    assert set(schemes(Int8Config(weights="tensor")).values()) == {Scheme(weights="tensor")}
    four = schemes(Int4Config(type="int", group=32))
    assert set(four.values()) == {Scheme(weight_bits=4, group=32, zero_point=True, activations="none")}


def test_learned_steps_wait_for_calibration() -> None:
    """Where they begin is what it finds; where there is none, at the largest magnitude."""
    at_once, later = (
        made(Int8Config(learn_scales=True, activations=activations)) for activations in ("dynamic", "static")
    )
    assert any("log_weight_scale" in name for name, _ in at_once.named_parameters())
    assert not any("log_" in name for name, _ in later.named_parameters())


def test_attention() -> None:
    assert not integer_attention(made(Int8Config()))
    for mode in ("dynamic", "static"):
        assert [attend.mode for attend in integer_attention(made(Int8Config(attention=mode))).values()] == [mode]
    made_so = Int8Config(attention="dynamic", attention_values="fp8", attention_keys="block")
    (attend,) = integer_attention(made(made_so)).values()
    assert (attend.mode, attend.granularity, attend.values, attend.keys) == ("dynamic", "token", "fp8", "block")


def test_int4_of_integers_is_frozen_and_finalized() -> None:
    config = Int4Config(type="int", group=32)
    model = made(config)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    config.finalize(model)
    layers = [module for module in model.modules() if isinstance(module, DeployedInt8)]
    assert len(layers) == 4
    assert all(layer.weight.dtype == torch.uint8 for layer in layers)


def test_configs_load_without_the_libraries_of_models() -> None:
    code = (
        "import sys; from vit_efficient.quantization import int8, int4, calibration; "
        "print(sorted({'timm', 'lightning', 'peft', 'bitsandbytes', 'torchao'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
