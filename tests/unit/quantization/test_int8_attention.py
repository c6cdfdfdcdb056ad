"""Integer attention in models: swapped in, calibrated, trained, stored, loaded again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.kernels.int8_attention import reference
from vit_efficient.kernels.int8_attention.reference import Keys, Values
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_attention import (
    Int8Attend,
    integer_attention,
    observe_attention,
    quantize_attention,
)
from vit_efficient.quantization.stored import StoredAttention
from vit_efficient.quantization.stored_attention import describe_attention

SMALL: dict[str, Any] = {"img_size": 40, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
IMAGES = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))
NAMES = ["blocks.0.attn", "blocks.1.attn"]


def make(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    swap_attention(model, SdpaConfig().build())
    return model


def ranges(model: nn.Module, images: Tensor = IMAGES) -> dict[tuple[str, str], float]:
    """The largest magnitude of each operand of each attention."""
    seen: dict[tuple[str, str], float] = {}

    def see(name: str, operand: str, x: Tensor) -> None:
        seen[name, operand] = max(seen.get((name, operand), 0.0), float(x.abs().max()))

    with torch.no_grad(), observe_attention(model, see):
        model(images)
    return seen


def static(model: nn.Module, values: Values = "int8") -> nn.Module:
    """Calibrated on `IMAGES` by their largest magnitudes."""
    amax = ranges(model)
    quantize_attention(model, "static", values=values)
    for name, attend in integer_attention(model).items():
        attend.set_scales(**{operand: amax[name, operand] / 127 for operand in attend.operands})
    return model


def similarity(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_relpos_small_patch16_224", {}),
        ("beit_base_patch16_224", {}),
        ("eva02_tiny_patch14_224", {"qkv_fused": False}),
        ("vit_dlittle_patch16_reg1_gap_256", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_models_of_all_kinds_attend_in_integers(name: str, arguments: dict[str, Any]) -> None:
    model = make(name, **arguments)
    with torch.no_grad():
        expected = model(IMAGES)
        names = quantize_attention(model, "dynamic")
        dynamic = model(IMAGES)
        assert similarity(dynamic, expected) > 0.995
        assert not torch.equal(dynamic, expected)
    assert len(names) == len(integer_attention(model)) >= 2
    again = static(make(name, **arguments))
    with torch.no_grad():
        assert similarity(again(IMAGES), expected) > 0.99


@pytest.mark.parametrize(
    ("granularity", "values", "keys"),
    [
        ("token", "int8", "token"),
        ("tensor", "int8", "token"),
        ("tensor", "float", "token"),
        ("token", "float", "block"),
        ("token", "fp8", "token"),
        ("token", "fp8", "block"),
    ],
)
def test_the_model_computes_the_reference(granularity: Literal["token", "tensor"], values: Values, keys: Keys) -> None:
    model = make()
    seen: dict[str, Tensor] = {}
    attention = model.blocks[0].attn
    with torch.no_grad(), observe_attention(model, lambda name, operand, x: seen.setdefault(f"{name}.{operand}", x)):
        model(IMAGES)
    quantize_attention(model, "dynamic", granularity, values, keys)
    operands = [seen[f"blocks.0.attn.{operand}"] for operand in "qkv"]
    y = attention.backend.attend(*operands, scale=attention.scale)
    forms: dict[str, Any] = {"values": values, "keys": keys}
    expected = reference.int8_attention(*operands, scale=attention.scale, granularity=granularity, **forms)
    assert torch.equal(y, expected)
    if granularity == "token":
        assert torch.equal(y, reference.attend(*operands, scale=attention.scale, **forms))
    if (values, keys) != ("int8", "token"):
        plain = reference.int8_attention(*operands, scale=attention.scale, granularity=granularity)
        assert not torch.equal(y, plain)
        assert similarity(y, plain) > 0.998


def test_observing_changes_nothing_and_leaves_nothing() -> None:
    model = make()
    backend = model.blocks[0].attn.backend
    with torch.no_grad():
        expected = model(IMAGES)
        shapes = []
        with observe_attention(model, lambda name, operand, x: shapes.append((name, operand, tuple(x.shape)))) as names:
            assert torch.equal(model(IMAGES), expected)
    assert names == NAMES
    assert shapes == [(name, operand, (4, 3, 26, 16)) for name in NAMES for operand in "qkv"]
    assert model.blocks[0].attn.backend is backend
    quantize_attention(model, "dynamic")
    integer, keys = model.blocks[0].attn.backend, list(model.state_dict())
    with pytest.raises(ZeroDivisionError), observe_attention(model, lambda *_: 1 / 0):
        model(IMAGES)
    assert model.blocks[0].attn.backend is integer
    assert "backend" not in model.blocks[0].attn.__dict__
    assert list(model.state_dict()) == keys


def test_observed_ranges_are_those_of_the_operands() -> None:
    """By hand for the first block: its projection, split into heads."""
    model = make()
    amax = ranges(model)
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(IMAGES))))
        qkv = model.blocks[0].attn.qkv(model.blocks[0].norm1(tokens))
    for operand, x in zip("qkv", qkv.chunk(3, dim=-1), strict=True):
        assert amax["blocks.0.attn", operand] == float(x.abs().max())


@pytest.mark.parametrize("values", ["int8", "float", "fp8"])
@pytest.mark.parametrize("mode", ["dynamic", "static", "block"])
def test_training_and_evaluation_are_the_same_arithmetic(mode: str, values: Values) -> None:
    model = make()
    model = static(model, values) if mode == "static" else model
    if mode != "static":
        quantize_attention(model, "dynamic", values=values, keys="block" if mode == "block" else "token")
    with torch.no_grad():
        expected = model.eval()(IMAGES)
    logits = model.train()(IMAGES)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    gradient = model.blocks[0].attn.qkv.weight.grad
    assert gradient is not None
    plain = make().train()
    plain(IMAGES).square().sum().backward()
    assert similarity(gradient, plain.blocks[0].attn.qkv.weight.grad) > 0.98


def test_a_static_form_without_scales_answers_nan_and_is_not_stored() -> None:
    model = make()
    quantize_attention(model, "static")
    with torch.no_grad():
        assert model(IMAGES).isnan().all()
    with pytest.raises(UserError, match=r"blocks\.0\.attn \(of 2 such\) has no scales\. Calibrate"):
        describe_attention(model)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_cannot_be_are_refused(bad: float) -> None:
    attend = Int8Attend("static")
    with pytest.raises(UserError, match="scale of k must be one number above 0"):
        attend.set_scales(q=1.0, k=bad, v=1.0)
    assert attend.q_scale.isnan()
    with pytest.raises(ValueError, match="dynamic integer attention has no scales"):
        Int8Attend("dynamic").set_scales(q=1.0, k=1.0, v=1.0)


def test_values_that_are_not_int8_have_no_scale() -> None:
    attend = Int8Attend("static", values="float")
    with pytest.raises(ValueError, match="has no scales"):
        attend.set_scales(q=1.0, k=1.0, v=1.0)
    attend.set_scales(q=1.0, k=2.0)
    assert dict(attend.named_buffers()) == {"q_scale": torch.tensor(1.0), "k_scale": torch.tensor(2.0)}


@pytest.mark.parametrize("forms", [{"mode": "static"}, {"granularity": "tensor"}])
def test_blocks_of_keys_are_for_scales_a_token(forms: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one scale a block of keys is for dynamic scales a token"):
        Int8Attend(**forms, keys="block")
    stored = StoredAttention(**{"mode": "dynamic", **forms}, keys="block")
    assert "one scale a block of keys does not go with" in str(stored.check({}))


def test_files_without_the_forms_are_read() -> None:
    """Those written before there was a choice."""
    model = make()
    quantize_attention(model, "dynamic")
    tensors, metadata = deployed_state(model)
    old = {name: {"mode": "dynamic", "granularity": "token"} for name in NAMES}
    fresh = make()
    load_deployed(fresh, tensors, metadata | {"attention": json.dumps(old)})
    assert describe_attention(fresh) == describe_attention(model)


def test_scales_stay_float32_under_any_cast() -> None:
    model = static(make())
    before = [attend.scales for attend in integer_attention(model).values()]
    for attend, scales in zip(integer_attention(model.half().bfloat16()).values(), before, strict=True):
        assert attend.scales is not None
        assert scales is not None
        for now, then in zip(attend.scales, scales, strict=True):
            assert now.dtype == torch.float32
            assert torch.equal(now, then)
    assert copy.deepcopy(model).to("meta").blocks[0].attn.backend.q_scale.is_meta


STORED = {
    "token": StoredAttention(mode="dynamic"),
    "tensor": StoredAttention(mode="dynamic", granularity="tensor"),
    "static": StoredAttention(mode="static"),
    "static_float": StoredAttention(mode="static", values="float"),
    "block": StoredAttention(mode="dynamic", values="fp8", keys="block"),
}


@pytest.mark.parametrize("form", STORED)
def test_a_file_gives_the_same_logits_bit_for_bit(form: str, tmp_path: Path) -> None:
    model, stored = make(), STORED[form]
    if stored.mode == "static":
        static(model, stored.values)
    else:
        quantize_attention(model, "dynamic", stored.granularity, stored.values, stored.keys)
    Int8Config().apply(model, compute_dtype=torch.float32)
    tensors, metadata = deployed_state(model)
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    fresh = make().train()
    load_deployed(fresh, tensors, metadata)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(IMAGES), model(IMAGES))
    assert describe_attention(fresh) == dict.fromkeys(NAMES, stored)


def test_files_that_do_not_fit_are_refused() -> None:
    model = static(make())
    tensors, metadata = deployed_state(model)
    key = "blocks.1.attn.backend.k_scale"
    assert tensors[key].shape == ()
    for altered, message in (
        ({k: t for k, t in tensors.items() if k != key}, "blocks.1.attn is not what .* it lacks k_scale"),
        (tensors | {key: tensors[key].half()}, "k_scale is 1 x torch.float16, not 1 x torch.float32"),
        (tensors | {key: torch.tensor(0.0)}, "k_scale is 0, not a number above 0"),
        (tensors | {key: torch.tensor(torch.nan)}, "k_scale is nan, not a number above 0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_deployed(make(), altered, metadata)
    with pytest.raises(CheckpointError, match=r"no attention blocks\.1\.attn"):
        load_deployed(make(depth=1), tensors, metadata)


def test_a_model_whose_attention_was_not_swapped_is_refused() -> None:
    with pytest.raises(UserError, match="no attention that goes through a backend"):
        quantize_attention(timm.create_model("vit_tiny_patch16_224", **SMALL), "dynamic")
