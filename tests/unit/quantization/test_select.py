"""Roles by structure, and what `keep` means."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from vit_efficient.errors import UserError
from vit_efficient.quantization.base import Report
from vit_efficient.quantization.select import find_layers, matching, select, vocabulary

PLAIN = {"patch_embed": 1, "qkv": 2, "proj": 2, "fc1": 2, "fc2": 2, "head": 1}
MODELS = {
    "vit_tiny_patch16_224": PLAIN,
    "deit3_small_patch16_224": PLAIN,
    "deit_tiny_distilled_patch16_224": PLAIN | {"head": 2},
    "eva02_tiny_patch14_224": PLAIN,
    "eva02_base_patch14_224": PLAIN | {"qkv": 6, "fc1": 4},  # q, k, v apart; gate and value apart
    "vit_small_patch14_reg4_dinov2": PLAIN,
    "vit_giant_patch14_dinov2": PLAIN,  # SwiGLU with gate and value in one layer
    "vit_small_patch16_dinov3": PLAIN,
    "vit_small_plus_patch16_dinov3": PLAIN | {"fc1": 4},
    "beit_base_patch16_224": PLAIN,
    "vit_small_patch16_18x2_224": PLAIN | {"qkv": 4, "proj": 4, "fc1": 4, "fc2": 4},  # two attentions a block
}


def make(name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **{"num_classes": 10, "depth": 2, **kwargs})


@pytest.mark.parametrize("name", MODELS)
def test_roles(name: str) -> None:
    layers = find_layers(make(name))
    assert Counter(layer.role for layer in layers) == MODELS[name]
    assert {layer.block for layer in layers if layer.role in ("qkv", "proj", "fc1", "fc2")} == {0, 1}
    assert [layer.kind for layer in layers if layer.role == "patch_embed"] == ["patches"]


def test_the_stem_of_a_hybrid_is_not_a_layer_on_patches() -> None:
    names = [layer.name for layer in find_layers(make("vit_tiny_r_s16_p8_224"))]
    assert "patch_embed.proj" in names
    assert not any(name.startswith("patch_embed.backbone") for name in names)


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ("fc2", {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"}),
        ("first_block", {f"blocks.0.{leaf}" for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
        ("last_block", {f"blocks.1.{leaf}" for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
        ("blocks.1.attn", {"blocks.1.attn.qkv", "blocks.1.attn.proj"}),
        ("*.proj", {"patch_embed.proj", "blocks.0.attn.proj", "blocks.1.attn.proj"}),
        ("proj", {"blocks.0.attn.proj", "blocks.1.attn.proj"}),  # the role, not the patch embedding's layer
        ("blocks", {f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}),
        ("block", set()),
    ],
)
def test_an_entry_of_keep(entry: str, names: set[str]) -> None:
    assert {layer.name for layer in matching(find_layers(make()), entry)} == names


def test_first_and_last_block_of_twelve() -> None:
    """Blocks are counted, not sorted as text."""
    layers = find_layers(make(depth=12))
    assert {layer.block for layer in matching(layers, "last_block")} == {11}


def test_a_model_without_a_head_may_keep_it() -> None:
    selection = select(make(num_classes=0), ("patch_embed", "head"))
    assert [kept.layer.name for kept in selection.kept] == ["patch_embed.proj"]


@pytest.mark.parametrize("keep", ["blocks.2.*", "mlp.fc1", "qvk"])
def test_an_entry_that_matches_nothing_lists_what_there_is(keep: str) -> None:
    with pytest.raises(UserError) as caught:
        select(make(), (keep,))
    text = str(caught.value)
    assert repr(keep) in text
    assert "qkv (2)" in text
    assert "blocks.{0..1}.mlp.fc1" in text


def test_nothing_left() -> None:
    with pytest.raises(UserError, match="nothing is left"):
        select(make(), ("patch_embed", "head", "qkv", "proj", "fc1", "fc2"))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_a_projection_that_is_not_called_is_refused(name: str) -> None:
    """timm's own attention multiplies `qkv.weight` itself there, so an integer layer would never run."""
    with pytest.raises(UserError, match="Swap the attention first"):
        select(make(name), ("patch_embed", "head"))


def test_vocabulary_stays_short() -> None:
    assert len(vocabulary(find_layers(make(depth=24))).splitlines()) == 2


def test_report() -> None:
    report = Report.of("int8", select(make(depth=6), ("patch_embed", "head")))
    assert report.lines() == [
        "int8: 24 of 26 layers (qkv 6, proj 6, fc1 6, fc2 6); kept patch_embed (patch_embed.proj), head (head)"
    ]
    assert report.quantized_parameters == 6 * 12 * 192**2
