"""fp8 attention in models: swapped in, trained, stored, loaded again, verified, asked for by recipes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError, RecipeError
from vit_efficient.kernels.fp8_attention import op, reference
from vit_efficient.kernels.fp8_attention.reference import Values
from vit_efficient.kernels.int8_attention.reference import dequantize, quantize_values
from vit_efficient.machine import Machine
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.fp8_attention import Fp8Attend
from vit_efficient.quantization.int8_attention import code_attention, observe_attention, quantize_attention_fp8
from vit_efficient.quantization.stored_attention import describe_attention
from vit_efficient.recipe.compat import check
from vit_efficient.recipe.load import load_recipe

SMALL: dict[str, Any] = {"img_size": 40, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
IMAGES = torch.randn(4, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def make(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    swap_attention(model, SdpaConfig().build())
    return model


def similarity(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("values", ["float", "fp8"])
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_relpos_small_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"]
)
def test_models_of_all_kinds_attend_in_fp8(name: str, values: Values) -> None:
    model = make(name)
    with torch.no_grad():
        expected = model(IMAGES)
        assert len(quantize_attention_fp8(model, values)) == 2
        found = model(IMAGES)
    assert similarity(found, expected) > 0.99
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("values", ["float", "fp8"])
def test_the_model_computes_the_reference(values: Values) -> None:
    model = make()
    seen: dict[str, Tensor] = {}
    attention = model.blocks[0].attn
    with torch.no_grad(), observe_attention(model, lambda name, operand, x: seen.setdefault(f"{name}.{operand}", x)):
        model(IMAGES)
    quantize_attention_fp8(model, values)
    operands = [seen[f"blocks.0.attn.{operand}"] for operand in "qkv"]
    y = attention.backend.attend(*operands, scale=attention.scale)
    assert torch.equal(y, reference.attend(*operands, scale=attention.scale, values=values))


@pytest.mark.parametrize("values", ["float", "fp8"])
def test_training_and_evaluation_are_the_same_arithmetic(values: Values) -> None:
    model = make()
    quantize_attention_fp8(model, values)
    with torch.no_grad():
        expected = model.eval()(IMAGES)
    logits = model.train()(IMAGES)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    plain = make().train()
    plain(IMAGES).square().sum().backward()
    assert similarity(model.blocks[0].attn.qkv.weight.grad, plain.blocks[0].attn.qkv.weight.grad) > 0.95


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("values", ["float", "fp8"])
def test_gradients_are_straight_through(
    values: Values, extras: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of float attention on what the codes stand for, by autograd, through the rotation."""
    torch.manual_seed(0)
    q, k, v = leaves = [torch.randn(2, 3, 150, width).requires_grad_() for _ in range(3)]
    bias = torch.randn(1, 3, 150, 150, requires_grad=True) if extras else None
    mask = (torch.rand(150, 150) < 0.8) | torch.eye(150, dtype=torch.bool) if extras else None
    dropped = F.dropout(torch.ones(2, 3, 150, 150), 0.3) if extras else None
    made = reference.operands(q.detach(), k.detach())
    r = reference.rotation(width)
    q_r, k_r = q @ r, k @ r
    q_r = q_r + (made.q.float() * made.q_rows - q_r).detach()
    k_r = k_r + (made.k.float() * made.k_rows - k_r).detach()
    v_r = v + (dequantize(*quantize_values(v.detach(), values)) - v).detach()
    s = q_r @ k_r.mT * (0.2 / made.divisor)
    s = s if bias is None else s + bias
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    expected = (s.softmax(-1) if dropped is None else s.softmax(-1) * dropped) @ v_r
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [*leaves, *([] if bias is None else [bias])], upstream)
    if extras:
        monkeypatch.setattr(op.F, "dropout", lambda ones, p: dropped)
    y = op.fp8_attention(q, k, v, bias=bias, mask=mask, scale=0.2, dropout=0.3 if extras else 0.0, values=values)
    assert distance(y, expected) < (5e-2 if values == "fp8" else 1e-5)
    found = torch.autograd.grad(y, [*leaves, *([] if bias is None else [bias])], upstream)
    for own, other in zip(found, wanted, strict=True):
        assert distance(own, other) < 1e-5


@pytest.mark.parametrize("values", ["float", "fp8"])
def test_a_file_gives_the_same_logits_bit_for_bit(values: Values) -> None:
    model = make()
    Fp8Config(attention="fp8", attention_values=values).apply(model, compute_dtype=torch.float32)
    tensors, metadata = deployed_state(model)
    fresh = make()
    load_deployed(fresh, tensors, metadata)
    with torch.no_grad():
        assert torch.equal(fresh(IMAGES), model(IMAGES))
    assert [attend.values for attend in code_attention(fresh).values()] == [values] * 2
    assert describe_attention(fresh) == describe_attention(model)
    alien = tensors | {"blocks.1.attn.backend.q_scale": torch.tensor(1.0)}
    with pytest.raises(CheckpointError, match=r"attention on codes of blocks\.1\.attn .* it has no tensors"):
        load_deployed(make(), alien, metadata)


def test_recipes_ask_for_it() -> None:
    recipe = load_recipe("fp8_sdpa", ["quantization.attention=fp8", "quantization.attention_values=fp8"]).recipe
    model = make()
    recipe.quantization.apply(model, compute_dtype=torch.float32)
    assert [type(attend) for attend in code_attention(model).values()] == [Fp8Attend] * 2
    assert check(recipe, Machine(cores=2), trains=True) == []


@pytest.mark.parametrize(
    ("words", "path", "text"),
    [
        (["attention=dynamic"], "attention", "must be one of none, fp8, got 'dynamic'"),
        (["attention_values=fp8"], "attention_values", "is fp8, and quantization.attention=none attends in floating"),
    ],
)
def test_recipes_that_make_no_sense(words: list[str], path: str, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("fp8_sdpa", [f"quantization.{word}" for word in words])
    (problem,) = caught.value.problems
    assert problem.path == f"quantization.{path}"
    assert text in str(problem)


def test_another_attention_kernel_is_refused() -> None:
    recipe = load_recipe("fp8_sdpa", ["quantization.attention=fp8", "attention=flash2"]).recipe
    (problem,) = [one for one in check(recipe, Machine(cores=2)) if one.path == "quantization.attention"]
    assert "is fp8, which takes the place of the attention kernel, and attention=flash2 asks" in problem.message
