"""What a checkpoint of an adapted model holds, and loading it into a base made again."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vit_efficient.errors import CheckpointError
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.lora import adapter_state, load_trainable_state, trainable_state
from vit_efficient.quantization.none import NoneConfig

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def make(config: Int4Config | NoneConfig, seed: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)  # the base
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    torch.manual_seed(seed)  # the adapters
    config.apply(model, compute_dtype=dtype)
    return model


@pytest.mark.parametrize("config", [Int4Config(), NoneConfig(lora=LoraConfig())], ids=["int4", "lora"])
def test_trained_parts_on_a_base_made_again(config: Int4Config | NoneConfig) -> None:
    model = make(config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(IMAGES).square().sum().backward()
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    assert set(state) - set(adapter_state(model)) == {"head.weight", "head.bias"}
    again = make(config, seed=2)
    with torch.no_grad():
        assert not torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
        load_trainable_state(again, state)
        assert torch.equal(again(IMAGES), model(IMAGES))


def test_parts_that_do_not_fit_are_named() -> None:
    model = make(Int4Config())
    state = trainable_state(make(Int4Config(lora=LoraConfig(rank=8, targets=("qkv",)))))
    with pytest.raises(CheckpointError) as caught:
        load_trainable_state(model, state)
    assert "missing blocks.0.attn.proj.lora_A.default.weight" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"is \(8, 192\), the model's is \(16, 192\)"):
        load_trainable_state(make(Int4Config(lora=LoraConfig(targets=("qkv",)))), state)


def test_without_the_head() -> None:
    model = make(Int4Config(lora=LoraConfig(train_head=False)))
    assert trainable_state(model).keys() == adapter_state(model).keys()


def test_base_in_the_precision_of_the_run_and_adapters_in_float32() -> None:
    model = make(NoneConfig(lora=LoraConfig()), dtype=torch.bfloat16)
    block = model.blocks[0]
    assert block.attn.qkv.base_layer.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in adapter_state(model).values()} == {torch.float32}
    assert model.head.weight.dtype == block.norm1.weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
