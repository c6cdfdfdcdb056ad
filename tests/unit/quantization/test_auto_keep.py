"""`keep: auto`: it protects what was spoilt, keeps to its budget, and trusts no figure but that of the joint model."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from vit_efficient.errors import RecipeError, UserError
from vit_efficient.quantization.agreement import LogitComparison, compare
from vit_efficient.quantization.auto_keep import choose_keep
from vit_efficient.quantization.base import AutoKeep, named
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.mixture import Mixture
from vit_efficient.quantization.select import find_layers
from vit_efficient.quantization.sensitivity import Record, Subject
from vit_efficient.recipe.load import load_recipe

BAD, ALSO_BAD = "blocks.1.mlp.fc1", "blocks.0.attn.proj"
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(7))
BATCHES = IMAGES.split(10)


def make(bad: Sequence[str] = (BAD,), keep: tuple[str, ...] = ()) -> Mixture:
    """An int8 model in which some layers' codes are noise."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=10).eval()
    quantized = copy.deepcopy(model)
    Int8Config(keep=keep).apply(quantized, compute_dtype=torch.float32)
    Int8Config().finalize(quantized)
    generator = torch.Generator().manual_seed(3)
    for name in bad:
        layer = quantized.get_submodule(name)
        layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape, generator=generator))
    return Mixture(model, quantized)


def added(mixture: Mixture, name: str) -> int:
    return mixture.float_bytes[name] - mixture.quantized_bytes[name]


def told(mixture: Mixture, **kl: float) -> list[Record]:
    """Single figures as somebody claims them: `kl` by name (dots as double underscores), and almost nothing else."""
    claims = {name.replace("__", "."): value for name, value in kl.items()}
    return [
        Record(Subject("layer", name, (name,)), 0, 0, LogitComparison(30.0, claims.get(name, 1e-9), 1.0, 24))
        for name in mixture.names
    ]


def agreement(mixture: Mixture, kept: Sequence[str]) -> float:
    """Of a model made anew with these layers in floating point."""
    mixed = copy.deepcopy(mixture.quantized_model)
    for name in kept:
        parent, _, child = name.rpartition(".")
        setattr(mixed.get_submodule(parent), child, mixture.float_model.get_submodule(name))
    with torch.no_grad():
        return compare(mixture.float_model(IMAGES), mixed(IMAGES)).agreement


@pytest.mark.parametrize("bad", [(), (BAD,), (ALSO_BAD, BAD)])
def test_what_was_spoilt_is_kept_and_nothing_else(bad: tuple[str, ...]) -> None:
    mixture = make(bad)
    choice = choose_keep(mixture, BATCHES, AutoKeep(max_drop=2))
    assert choice.chosen == choice.keep == bad
    assert choice.record.drop <= 2 < 100 * (1 - agreement(mixture, bad[:-1])) or not bad
    assert choice.record.logits.agreement == agreement(mixture, bad)
    assert choice.plain.logits.agreement == agreement(mixture, ())
    assert choice.weight_bytes == mixture.total_bytes + sum(added(mixture, name) for name in bad)


def test_drop_is_of_top1_where_there_are_labels() -> None:
    """Labels that only the spoilt model gets right: by them nothing is lost, whatever the agreement."""
    mixture = make()
    with torch.no_grad():
        labels = mixture.quantized_model(IMAGES).argmax(1)
    choice = choose_keep(mixture, BATCHES, AutoKeep(), labels)
    assert choice.chosen == ()
    assert choice.record.drop < 0
    assert choose_keep(mixture, BATCHES, AutoKeep()).chosen == (BAD,)


def test_the_recipe_gets_all_that_stays_in_floating_point() -> None:
    """Layers that were never quantized are named too, and the list gives back the model that was measured."""
    mixture = make(keep=("patch_embed", "last_block"))
    choice = choose_keep(mixture, BATCHES, AutoKeep())
    last = tuple(f"blocks.2.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    assert choice.keep == ("patch_embed.proj", BAD, *last)
    Int8Config(keep=choice.keep).apply(mixture.float_model, compute_dtype=torch.float32)
    integer = {layer.name for layer in find_layers(mixture.float_model) if type(layer.module) is not nn.Linear}
    assert integer - {"patch_embed.proj"} == set(mixture.names) - {BAD}


def test_bytes() -> None:
    """What fits to the byte is kept, and nothing that does not fit."""
    mixture = make()
    exact = mixture.total_bytes + added(mixture, BAD)
    assert choose_keep(mixture, BATCHES, AutoKeep(max_bytes=exact)).chosen == (BAD,)
    less = choose_keep(mixture, BATCHES, AutoKeep(max_bytes=exact - 1))
    assert BAD not in less.chosen
    assert less.chosen
    assert less.weight_bytes <= exact - 1


def test_a_large_layer_may_be_worth_more_than_small_ones() -> None:
    """By bytes the head comes first, and then the spoilt layer does not fit; by divergence alone it does."""
    mixture = make()
    budget = AutoKeep(max_bytes=mixture.total_bytes + added(mixture, BAD))
    claims = told(mixture, head=1.0, blocks__1__mlp__fc1=2.0)
    assert 1.0 / added(mixture, "head") > 2.0 / added(mixture, BAD)
    assert choose_keep(mixture, BATCHES, budget, records=claims).chosen == (BAD,)


def test_single_figures_that_mislead_are_found_out() -> None:
    """A claim puts a harmless layer first: the joint model shows that it does not do, and more are kept."""
    mixture = make()
    claims = told(mixture, head=9.0, blocks__0__attn__qkv=8.0, blocks__1__mlp__fc1=0.1)
    choice = choose_keep(mixture, BATCHES, AutoKeep(max_drop=2), records=claims)
    assert choice.chosen == ("blocks.0.attn.qkv", BAD, "head")


def test_the_same_images_give_the_same_choice() -> None:
    choices = [choose_keep(make((ALSO_BAD, BAD)), BATCHES, AutoKeep(max_drop=5)) for _ in range(2)]
    assert choices[0] == choices[1]


def test_budgets_that_cannot_be_met() -> None:
    mixture = make()
    smallest, largest = mixture.total_bytes, mixture.bytes_with(mixture.names)
    runs: list[int] = []
    for limit, said in ((smallest - 1, "every layer quantized"), (largest, "quantization=none")):
        with pytest.raises(UserError, match=said):
            choose_keep(mixture, BATCHES, AutoKeep(max_bytes=limit), progress=lambda done, total: runs.append(done))
    assert not runs, "known before anything is measured"
    with pytest.raises(UserError, match=r"max_drop=2 cannot be met within max_bytes.* or max_bytes\."):
        choose_keep(mixture, BATCHES, AutoKeep(max_drop=2, max_bytes=smallest + 10_000))
    hopeless = make([layer.name for layer in mixture.layers])
    with pytest.raises(UserError, match=r"with 13 of 14 layers in full precision.* Raise max_drop\."):
        choose_keep(hopeless, BATCHES, AutoKeep(max_drop=0))
    with pytest.raises(UserError, match="no images"):
        choose_keep(mixture, [], AutoKeep())


def test_recipe() -> None:
    words = ("quantization.keep=auto", "quantization.budget.max_bytes=2000000")
    quantization = load_recipe("int4_sdpa", words).recipe.quantization
    assert isinstance(quantization, Int4Config)
    assert quantization.keep == "auto"
    assert quantization.budget == AutoKeep(max_bytes=2_000_000)
    with pytest.raises(RecipeError, match=r"quantization\.budget.*keep: auto"):
        load_recipe("int4_sdpa", ["quantization.budget.max_drop=1"])
    with pytest.raises(RecipeError, match=r"quantization\.keep.*list, each text or auto"):
        load_recipe("int4_sdpa", ["quantization.keep=most"])


def test_limits() -> None:
    assert AutoKeep().drop_limit == 0.3
    assert AutoKeep(max_bytes=5).drop_limit is None, "bytes alone: as close as they allow"
    assert AutoKeep(max_drop=0).drop_limit == 0
    for wrong in ({"max_drop": -1}, {"max_bytes": 0}):
        with pytest.raises(ValidationError):
            AutoKeep.model_validate(wrong)


def test_auto_that_nobody_resolved() -> None:
    """It must not be taken for the letters a, u, t and o."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    with pytest.raises(UserError, match=r"vit_efficient\.quantize"):
        Int4Config(keep="auto").apply(model, compute_dtype=torch.float32)
    assert named(("head",)) == ("head",)
