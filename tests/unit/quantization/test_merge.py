"""Merged weights answer as adapters and base do, whatever was computed before the merge."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import timm
import torch
from bitsandbytes.nn.modules import has_avx512bf16
from torch import Tensor, nn

from vit_efficient.errors import UserError
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.bnb_int8 import BnbInt8Config
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.merge import Merged, float_weight, merge, merged_weight, without_adapters
from vit_efficient.quantization.none import NoneConfig

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
KINDS: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True},
                                    "both": {"dora": True, "rslora": True}}  # fmt: skip
BASES: dict[str, Any] = {
    "float": NoneConfig(),
    "nf4": Int4Config(),
    "fp4": Int4Config(type="fp4", double_quant=False),
    "int8": BnbInt8Config(),
}


def make(base: str, dtype: torch.dtype = torch.float32, **lora: Any) -> nn.Module:
    """A model with adapters as after some training, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    torch.manual_seed(1)
    config = BASES[base].model_copy(update={"lora": LoraConfig(rank=4, **lora)})
    config.apply(model, compute_dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(IMAGES).float()


def difference(reference: Tensor, other: Tensor) -> float:
    return float((reference - other).norm() / reference.norm())


@pytest.mark.parametrize("base", ["float", "nf4", "fp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_answers_up_to_rounding(kind: str, base: str) -> None:
    """In float32 within 1e-5 of the logits' norm (measured: 2e-6 at most), in bfloat16 within 3e-2 (2e-2)."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model = make(base, dtype, **KINDS[kind])
        before = logits(model, dtype)
        assert merge(model) == Merged(adapters=8, dequantized=0 if base == "float" else 8, exact=True)
        assert difference(before, logits(model, dtype)) < bound
        assert {type(module) for module in model.modules() if hasattr(module, "in_features")} == {nn.Linear}
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_adapters_matter_in_this_test() -> None:
    """What the bounds above are worth: without its adapters the model answers something else altogether."""
    with_adapters, without = make("nf4"), make("nf4")
    for module in without.modules():
        if hasattr(module, "lora_B"):
            module.lora_B["default"].weight.data.zero_()  # type: ignore[index, union-attr]
    assert difference(logits(with_adapters), logits(without)) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_llm_int8_is_merged_but_not_exactly(kind: str) -> None:
    """Its inputs are quantized, those of a float layer are not: with the weights as they are stored it is exact."""
    model = make("int8", **KINDS[kind])
    before, weights = logits(model), copy.deepcopy(model)
    assert merge(model) == Merged(adapters=8, dequantized=8, exact=False)
    assert 1e-4 < difference(before, logits(model)) < 0.1
    for module in list(weights.modules()):
        if hasattr(module, "lora_A"):
            layer = nn.Linear(module.in_features, module.out_features)  # type: ignore[arg-type]
            layer.weight, layer.bias = nn.Parameter(float_weight(module.base_layer)), module.base_layer.bias  # type: ignore
            module.base_layer = layer
    assert difference(logits(weights), logits(model)) < 1e-5


def test_layers_without_an_adapter_become_float_too() -> None:
    model = make("nf4", targets=("qkv",))
    before = logits(model)
    assert merge(model) == Merged(adapters=2, dequantized=8, exact=True)
    assert difference(before, logits(model)) < 1e-5
    assert {type(module) for module in model.modules() if hasattr(module, "in_features")} == {nn.Linear}
    assert not getattr(model, "is_loaded_in_4bit", False)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["nf4", "fp4"])
def test_an_evaluation_before_the_merge_changes_nothing(base: str, kind: str) -> None:
    """bitsandbytes' own layers are repacked in place by it where the CPU has AVX512-BF16, and merge to garbage."""
    model, fresh = make(base, **KINDS[kind]), make(base, **KINDS[kind])
    logits(model)
    with torch.no_grad():
        model(IMAGES[:1])
    merge(model)
    merge(fresh)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())


def plain_4bit() -> bnb.nn.Linear4bit:
    """bitsandbytes' own layer, quantized."""
    torch.manual_seed(0)
    source = nn.Linear(192, 320)
    layer = bnb.nn.Linear4bit(192, 320, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(source.state_dict())
    return layer.to("cpu").eval()


def test_plain_bitsandbytes_layer_is_dequantized() -> None:
    layer = plain_4bit()
    assert layer.weight.dtype == torch.uint8
    x = torch.randn(5, 192, requires_grad=True)  # with a gradient it is not repacked
    assert torch.allclose(nn.functional.linear(x, float_weight(layer), layer.bias), layer(x), atol=1e-5)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU makes bitsandbytes repack nothing (no AVX512-BF16)")
def test_repacked_bitsandbytes_layer_is_refused_where_peft_would_give_garbage() -> None:
    layer, x = plain_4bit(), torch.randn(5, 192)
    weight = float_weight(layer)
    with torch.no_grad():
        layer(x)
    garbage = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # what a naive merge reads
    assert difference(weight, garbage.view_as(weight).float()) > 1
    with pytest.raises(UserError, match="repacked"):
        float_weight(layer)


def test_plain_bitsandbytes_8bit_layer() -> None:
    torch.manual_seed(0)
    source = nn.Linear(64, 32)
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(source.state_dict())
    layer = layer.to("cpu").eval()
    before = float_weight(layer)
    with torch.no_grad():
        layer(torch.randn(2, 64))  # moves the codes
    assert torch.equal(float_weight(layer), before)
    step = source.weight.abs().amax(1, keepdim=True) / 127
    assert ((before - source.weight).abs() <= 0.6 * step).all()  # half a step, and bitsandbytes' float16


def test_what_cannot_be_merged_is_refused() -> None:
    model = make("nf4")
    merge(model)
    with pytest.raises(UserError, match="no adapters"):
        merge(model)  # twice

    trained = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    Int8Config().apply(trained, compute_dtype=torch.float32)
    with pytest.raises(UserError, match="no adapters"):
        merge(trained)
    Int8Config().finalize(trained)
    with pytest.raises(UserError, match=r"blocks.0.mlp.fc1: a DeployedInt8 cannot be made float"):
        float_weight(trained.blocks[0].mlp.fc1, "blocks.0.mlp.fc1")

    broken = make("nf4")
    broken.blocks[1].mlp.fc2.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc2: the merged weight has values that are not finite"):
        merge(broken)

    half = make("float")
    half.blocks[0].attn.qkv.merge()
    with pytest.raises(UserError, match="adds it twice"):
        merged_weight(half.blocks[0].attn.qkv)


def test_the_scheme_without_its_adapters() -> None:
    config = Int4Config(type="fp4", train="critical", critical=("first_block", "norms", "head"), base="x")
    plain = without_adapters(config)
    assert plain == Int4Config(type="fp4", lora=None, keep=("patch_embed", "head", "first_block"))
    with pytest.raises(UserError, match="--requantize"):
        without_adapters(NoneConfig(lora=LoraConfig()))
