"""A model too large for float32 on the host, in small: same class, two narrow blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.layers
import torch
from safetensors.torch import save_file
from torch import nn

from vit_efficient.errors import UserError
from vit_efficient.model import narrow
from vit_efficient.model.backbone import create_backbone
from vit_efficient.model.build import build_model
from vit_efficient.model.narrow import Undrawn, narrow_linears
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


def test_what_is_large_and_narrow_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "LARGE", 64)
    for draw in (timm.layers.trunc_normal_, nn.init.trunc_normal_, nn.init.normal_, nn.init.uniform_):
        large = torch.full((8, 8), 7.0, dtype=torch.bfloat16)
        others = torch.full((4, 4), 7.0, dtype=torch.bfloat16), torch.full((8, 8), 7.0)
        with Undrawn():
            for tensor in (large, *others):
                draw(tensor)
        assert large.eq(0).all()
        assert not any(other.eq(7).any() or other.eq(0).all() for other in others), "small, or not narrow"


def classifier(words: tuple[str, ...], name: str = "vit_7b_patch16_dinov3") -> torch.Tensor:
    torch.manual_seed(3)
    return create_backbone(recipe_of(words=(f"model.name={name}", *words)).model, 5).model.get_classifier().weight


@pytest.mark.parametrize("kwargs", ["depth=2", "weight_init=jax"])
def test_a_classifier_begins_as_in_float32(kwargs: str) -> None:
    """Its scale is the model's own; in bfloat16 timm would draw some weights a hundred times too large."""
    name = "vit_7b_patch16_dinov3" if kwargs == "depth=2" else "vit_small_patch16_224"
    words = (f"model.kwargs.{kwargs}",)
    if kwargs != "depth=2":
        words += ("model.kwargs.global_pool=token",)
    here, there = (classifier((*words, f"model.storage={storage}"), name) for storage in ("bfloat16", "float32"))
    assert here.dtype == torch.float32
    assert here.std().item() == pytest.approx(there.std().item(), rel=0.2)
    assert here.abs().max() <= 6 * there.std()


def test_a_large_classifier_has_first_values_where_the_model_draws_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "LARGE", 64)
    weight = torch.full((16, 16), 7.0)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: weight.clone())
    with narrow_linears(torch.bfloat16), Undrawn():
        model = nn.Module()
        model.head = nn.Linear(16, 16, bias=False)
    assert model.head.weight.dtype == torch.float32
    assert 0.01 < model.head.weight.std() < 0.03


@pytest.mark.parametrize("head", [True, False])
def test_given_weights_are_not_drawn_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bool) -> None:
    """Weights are those of the file; a classifier that it has not is drawn."""
    monkeypatch.setattr(narrow, "LARGE", 64)
    entered = []

    class Seen(Undrawn):
        def __enter__(self) -> Undrawn:
            entered.append(self)
            return super().__enter__()

    monkeypatch.setattr("vit_efficient.model.backbone.Undrawn", Seen)
    origin = create_backbone(recipe_of().model, 5).model.state_dict()
    assert not entered
    assert origin["blocks.0.attn.proj.weight"].float().std() > 0.01, "without weights all is drawn"
    state = {name: tensor.contiguous() for name, tensor in origin.items() if head or not name.startswith("head")}
    save_file(state, tmp_path / "base.safetensors")
    words = (f"model.weights={tmp_path / 'base.safetensors'}",)
    made = create_backbone(recipe_of(words=words).model, 5).model.state_dict()
    assert entered
    for name, tensor in state.items():
        assert torch.equal(made[name], tensor), name
    assert made["head.weight"].std().item() == pytest.approx(origin["head.weight"].std().item(), rel=0.3)
