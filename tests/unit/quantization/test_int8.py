"""Whole models: what is trained is what is deployed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_layers import DeployedInt8, Int8Linear, Int8Patches
from vit_efficient.quantization.select import find_layers

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}),
    "eva02 split, gated": ("eva02_base_patch14_224", {"img_size": 28, "depth": 2, "embed_dim": 96, "num_heads": 3}),
    "eva02 fused": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 2}),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
    "dinov3 rope": ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 2}),
}


def make(
    name: str, *, keep: tuple[str, ...] = ("patch_embed", "head"), quantized: bool = True
) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    timm_name, kwargs = MODELS[name]
    model = timm.create_model(timm_name, num_classes=10, **kwargs)
    swap_attention(model, SdpaConfig().build())
    if quantized:
        Int8Config(keep=keep).apply(model, compute_dtype=torch.float32)
    return model, kwargs["img_size"]


@pytest.mark.parametrize("name", MODELS)
def test_training_logits_equal_deployed_logits_bit_for_bit(name: str, tmp_path: Path) -> None:
    """By finalizing in place, and by a file loaded into a fresh model."""
    model, size = make(name)
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        trained = model.train()(images)
    tensors, metadata = deployed_state(model)
    save_file(tensors, tmp_path / "m.safetensors")
    Int8Config().finalize(model)
    fresh, _ = make(name, quantized=False)
    load_deployed(fresh, load_file(tmp_path / "m.safetensors"), metadata)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), trained)
        assert torch.equal(fresh.eval()(images), trained)
    codes = [m for m in model.modules() if isinstance(m, DeployedInt8)]
    assert codes
    assert all(m.weight.dtype == torch.int8 for m in codes)
    assert not any(isinstance(m, Int8Linear) for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_inside_the_blocks_is_found_by_role(name: str) -> None:
    model, _ = make(name, quantized=False)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
    roles = {layer.name: layer.role for layer in find_layers(model)}
    assert {n for n in linear if roles[n] in ("qkv", "proj", "fc1", "fc2")} == linear


def test_parameter_names_do_not_change() -> None:
    plain, _ = make("vit", quantized=False)
    quantized, _ = make("vit")
    assert list(plain.state_dict()) == list(quantized.state_dict())
    quantized.load_state_dict(plain.state_dict())


def test_keep() -> None:
    model, _ = make("vit", keep=("head", "first_block", "*.mlp.fc2"))
    integer = {n for n, m in model.named_modules() if isinstance(m, Int8Linear | Int8Patches)}
    assert integer == {"patch_embed.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1"}


def test_quantized_patches_are_close_to_the_convolution() -> None:
    plain, size = make("vit", quantized=False)
    model, _ = make("vit", keep=("head", "qkv", "proj", "fc1", "fc2"))
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, size, size)
    a, b = plain.patch_embed(images), model.patch_embed(images)
    assert a.shape == b.shape
    assert (a - b).norm() / a.norm() < 0.02


@pytest.mark.parametrize(("keep", "text"), [(("blocks.9.*",), "blocks.9"), (("*",), "nothing")])
def test_keep_that_is_wrong(keep: tuple[str, ...], text: str) -> None:
    with pytest.raises(UserError) as caught:
        make("vit", keep=keep)
    assert text in str(caught.value)
    if text != "nothing":
        assert "blocks.{0..1}.attn.qkv" in str(caught.value)  # the names there are


def test_gradients_reach_every_weight() -> None:
    model, size = make("vit")
    model(torch.randn(2, 3, size, size)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_scales_survive_a_cast() -> None:
    model, _ = make("vit")
    Int8Config().finalize(model)
    layer = model.blocks[0].attn.qkv
    before = layer.weight_scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.weight_scale, before)
    assert layer.weight.dtype == torch.int8


def test_file_of_another_model_is_refused() -> None:
    model, _ = make("vit")
    tensors, metadata = deployed_state(model)
    other, _ = make("deit3", quantized=False)
    with pytest.raises(CheckpointError):
        load_deployed(other, tensors, metadata)
    fresh, _ = make("vit", quantized=False)
    with pytest.raises(CheckpointError, match=r"version|format"):
        load_deployed(fresh, tensors, {**metadata, "version": "999"})
