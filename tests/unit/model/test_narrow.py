"""A model too large for float32 on the host, in small: same class, two narrow blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vit_efficient.errors import UserError
from vit_efficient.model.build import build_model
from vit_efficient.model.narrow import narrow_linears
from vit_efficient.quantization.int4_layers import FrozenLinear4bit
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

SHRUNK = [
    "protocol=dinov3_7b",
    "model.kwargs.depth=2",
    "model.kwargs.embed_dim=128",
    "model.kwargs.num_heads=4",
    "model.image_size=32",
    "quantization.precision=fp32",
]


def recipe_of(variant: str = "int4_sdpa", words: tuple[str, ...] = ()) -> Recipe:
    return load_recipe(variant, [*SHRUNK, *words]).recipe


def test_attention_and_gated_mlp_are_quantized_and_adapted() -> None:
    built = build_model(recipe_of(), 5)
    roles = [role for _, role, _ in built.report.quantized]
    assert sum(isinstance(module, FrozenLinear4bit) for module in built.model.modules()) == len(roles)
    assert {role: roles.count(role) for role in roles} == {"qkv": 2, "proj": 2, "fc1": 4, "fc2": 2}
    assert len(built.report.adapters) == 10
    assert built.blocks[0].attn.replaces == "EvaAttention"


def test_only_frozen_layers_were_narrow() -> None:
    built = build_model(recipe_of(), 5)
    assert {p.dtype for p in built.model.parameters() if p.requires_grad} == {torch.float32}
    floating = {b.dtype for b in built.model.buffers() if b.is_floating_point()}
    assert floating <= {torch.float32}, "positions are computed in float32"
    assert built.model.get_classifier().weight.dtype == torch.float32


def test_it_learns() -> None:
    torch.manual_seed(0)
    # DINOv3's layer scales begin at 1e-5, and nothing that is random so far passes them in fifteen steps.
    model = build_model(recipe_of(words=("model.kwargs.init_values=1.0",)), 5).model.train()
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10) % 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_no_linear_layer_stays_wide_while_a_model_is_made() -> None:
    wide = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number in range(3):
                setattr(self, f"layer{number}", nn.Linear(8, 8))
                wide.append(sum(p.dtype == torch.float32 for p in self.parameters()))

    with narrow_linears(torch.bfloat16):
        made = Watched()
    assert wide == [0, 0, 0]
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert nn.Sequential(nn.Linear(2, 2))[0].weight.dtype == torch.float32, "afterwards nothing is cast"


def test_weights_that_are_trained_are_not_rounded() -> None:
    with pytest.raises(UserError, match=r"model\.storage: bfloat16 rounds the weights"):
        build_model(recipe_of("int8_sdpa"), 5)
