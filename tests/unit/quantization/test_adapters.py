"""4-bit bases and low-rank adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import UserError
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.none import NoneConfig

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def make(config: Int4Config | NoneConfig | None, name: str = "vit_tiny_patch16_224") -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": 28} if "patch14" in name else {"img_size": 32, "patch_size": 8}
    model = timm.create_model(name, num_classes=10, depth=2, **size)
    swap_attention(model, SdpaConfig().build())
    if config is not None:
        torch.manual_seed(1)
        config.apply(model, compute_dtype=torch.float32)
    return model


def trained_a_little(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


CONFIGS = {
    "nf4": Int4Config(),
    "fp4": Int4Config(type="fp4", double_quant=False),
    "lora": NoneConfig(lora=LoraConfig(rank=4)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_only_adapters_and_head_are_trained(name: str) -> None:
    model = make(CONFIGS[name])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert sum("lora_A" in n for n in trained) == 8  # qkv, proj, fc1, fc2 of two blocks
    model(IMAGES).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_fresh_adapters_change_nothing() -> None:
    plain, adapted = make(None), make(CONFIGS["lora"])
    torch.testing.assert_close(adapted.eval()(IMAGES), plain.eval()(IMAGES))


def test_nf4_is_close_and_small() -> None:
    plain, quantized = make(None).eval(), make(CONFIGS["nf4"]).eval()
    with torch.no_grad():
        error = (quantized(IMAGES) - plain(IMAGES)).norm() / plain(IMAGES).norm()
    assert 0.005 < error < 0.5
    tensors, _ = deployed_state(quantized)
    weight = tensors["blocks.0.mlp.fc1.base_layer.weight"]
    assert weight.dtype == torch.uint8
    assert weight.numel() == 192 * 768 // 2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_loaded_afresh_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = trained_a_little(make(CONFIGS[name])).eval()
    with torch.no_grad():
        # An evaluation first: bitsandbytes repacks 4-bit weights in place on some CPUs, and what is saved afterwards
        # must still be the weights.
        expected = model(IMAGES)
        tensors, metadata = deployed_state(model)
        save_file(tensors, tmp_path / "m.safetensors")
        fresh = make(None)
        load_deployed(fresh, load_file(tmp_path / "m.safetensors"), metadata)
        torch.testing.assert_close(fresh.eval()(IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_quantizing_the_same_base_twice_gives_the_same_bits() -> None:
    """What lets a checkpoint hold the adapters alone."""
    a, b = make(CONFIGS["nf4"]).state_dict(), make(CONFIGS["nf4"]).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_split_and_gated_layers_get_adapters() -> None:
    model = make(CONFIGS["lora"], "eva02_base_patch14_224")
    names = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if "lora_A" in n}
    assert {"q_proj", "k_proj", "v_proj", "proj", "fc2"} <= names


def test_patch_embedding_in_four_bits_is_refused() -> None:
    with pytest.raises(UserError, match="patch_embed"):
        make(Int4Config(keep=("head",)))
