"""Mixtures of a float and a quantized model: the layers named, nothing else, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import UserError
from vit_efficient.quantization.deploy import deployed_state, total_bytes
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.mixture import Mixture, Trace
from vit_efficient.quantization.none import NoneConfig
from vit_efficient.quantization.surgery import replace, swapped

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 3}),
    "eva02 split, gated": ("eva02_base_patch14_224", {"img_size": 28, "depth": 3, "embed_dim": 96, "num_heads": 3}),
    "dinov3 rope": ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 3}),
}


def make(name: str = "vit") -> tuple[nn.Module, nn.Module, Tensor]:
    """A float model, its int8 twin with every layer quantized, and images."""
    torch.manual_seed(0)
    timm_name, kwargs = MODELS[name]
    model = timm.create_model(timm_name, num_classes=10, **kwargs).eval()
    swap_attention(model, SdpaConfig().build())
    quantized = copy.deepcopy(model)
    Int8Config(keep=()).apply(quantized, compute_dtype=torch.float32)
    Int8Config().finalize(quantized)
    return model, quantized, torch.randn(3, 3, kwargs["img_size"], kwargs["img_size"])


@pytest.mark.parametrize("name", MODELS)
def test_both_ends_are_the_models_themselves(name: str) -> None:
    model, quantized, images = make(name)
    mixture = Mixture(model, quantized)
    with torch.no_grad():
        plain, integer = model(images), quantized(images)
    assert not torch.equal(plain, integer)
    for mixed, expected in (
        (mixture.only(()), plain),
        (mixture.only(mixture.names), integer),
        (mixture.without(()), integer),
        (mixture.without(mixture.names), plain),
    ):
        assert torch.equal(mixed(images), expected)
    with torch.no_grad():
        assert torch.equal(model(images), plain), "everything was put back"
        assert torch.equal(quantized(images), integer)


@pytest.mark.parametrize("name", MODELS)
def test_recorded_blocks_change_nothing(name: str) -> None:
    """Any single layer: with blocks recalled, without, and in a copy of the model, bit for bit the same."""
    model, quantized, images = make(name)
    mixture, trace = Mixture(model, quantized), Trace()
    with trace.of(model):
        plain = mixture.only(())(images)
    for layer in mixture.layers:
        copied = copy.deepcopy(model)
        replace(copied, layer.name, copy.deepcopy(layer.module))
        with torch.no_grad():
            expected = copied(images)
        mixed = mixture.only([layer.name])
        assert torch.equal(mixed(images, trace), expected), layer.name
        assert torch.equal(mixed(images), expected)
        assert not torch.equal(expected, plain)


def test_recorded_blocks_do_not_run_again() -> None:
    model, quantized, images = make()
    mixture, trace, ran = Mixture(model, quantized), Trace(), []
    with trace.of(model):
        mixture.only(())(images)
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    mixture.only(["blocks.2.mlp.fc2", "blocks.1.attn.qkv"])(images, trace)
    assert ran == [1, 2]
    ran.clear()
    mixture.only(["patch_embed.proj", "blocks.1.attn.qkv"])(images, trace)
    assert ran == [0, 1, 2], "a layer before the blocks changes all of them"


def test_bytes_are_those_of_the_file() -> None:
    model, quantized, _ = make()
    mixture = Mixture(model, quantized)
    kept = ("head", "blocks.0.mlp.fc1")
    with swapped(quantized, {name: model.get_submodule(name) for name in kept}):
        expected = total_bytes(deployed_state(quantized)[0])
    assert mixture.bytes_with(kept) == expected
    assert mixture.bytes_with(mixture.names) == total_bytes(deployed_state(model)[0])
    half = Mixture(model, quantized, torch.bfloat16)
    layer = model.head
    assert half.float_bytes["head"] == 2 * (layer.weight.numel() + layer.bias.numel())


def test_swapped_restores_after_an_error() -> None:
    model, quantized, _ = make()
    own = model.head
    with pytest.raises(RuntimeError, match="halfway"), swapped(model, {"head": quantized.head}):
        raise RuntimeError("halfway")
    assert model.head is own


def test_models_that_cannot_be_mixed() -> None:
    model, quantized, _ = make()
    with pytest.raises(UserError, match="nothing to compare"):
        Mixture(model, model)
    with pytest.raises(UserError, match="has no float layer"):
        Mixture(quantized, quantized)
    adapted = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    NoneConfig.model_validate({"lora": {}}).apply(adapted, compute_dtype=torch.float32)
    with pytest.raises(UserError, match="adapter"):
        Mixture(model, adapted)
