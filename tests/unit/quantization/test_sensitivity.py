"""Sensitivity: what is measured, and that a layer that was spoilt stands out."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import UserError
from vit_efficient.quantization.agreement import compare
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.mixture import Mixture
from vit_efficient.quantization.sensitivity import Record, Subject, measure, subjects

BAD = "blocks.1.mlp.fc1"
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def make(depth: int = 3) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, num_classes=10).eval()
    quantized = copy.deepcopy(model)
    Int8Config(keep=()).apply(quantized, compute_dtype=torch.float32)
    Int8Config().finalize(quantized)
    return model, quantized


def spoil(quantized: nn.Module, name: str = BAD) -> None:
    """Codes that are noise, of the size that the layer's codes have."""
    generator = torch.Generator().manual_seed(3)
    layer = quantized.get_submodule(name)
    layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape, generator=generator))


def found(records: list[Record], kind: str) -> dict[str, Record]:
    return {record.subject.name: record for record in records if record.subject.kind == kind}


def test_spoilt_layer_is_ranked_worst() -> None:
    """Alone, by its role and by its block; and protecting that role is what helps."""
    model, quantized = make()
    spoil(quantized)
    mixture = Mixture(model, quantized)
    records = measure(mixture, subjects(mixture), IMAGES.split(10))
    for kind, name in (("layer", BAD), ("role", "fc1"), ("block", "blocks.1")):
        own = found(records, kind)
        assert max(own, key=lambda key: own[key].logits.kl) == name
        assert min(own, key=lambda key: own[key].logits.snr_db) == name
        others = [record.logits.kl for key, record in own.items() if key != name]
        assert own[name].logits.kl > 20 * max(others)
    protected = found(records, "protect")
    assert min(protected, key=lambda key: protected[key].logits.kl) == "fc1"
    assert protected["fc1"].logits.kl < 0.05 * found(records, "all")["everything"].logits.kl


def test_figures_are_those_of_the_mixture() -> None:
    """Against a copy of the model with the same layers quantized; batches of unlike sizes; labels counted."""
    model, quantized = make()
    spoil(quantized)
    mixture = Mixture(model, quantized)
    labels = torch.arange(24) % 10
    names = ("blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "blocks.2.mlp.fc1")
    (record,) = measure(mixture, [Subject("role", "fc1", names)], IMAGES.split(9), labels)
    mixed = copy.deepcopy(model)
    for name in names:
        mixed.get_submodule(name.removesuffix(".fc1")).fc1 = quantized.get_submodule(name)
    with torch.no_grad():
        reference, logits = model(IMAGES), mixed(IMAGES)
    expected = compare(reference, logits)
    assert record.logits.agreement == expected.agreement < 1
    assert (record.logits.snr_db, record.logits.kl) == (pytest.approx(expected.snr_db), pytest.approx(expected.kl))
    before, after = reference.argmax(1) == labels, logits.argmax(1) == labels
    assert (record.top1, record.lost, record.gained) == (
        pytest.approx(after.float().mean().item()), int((before & ~after).sum()), int((after & ~before).sum()),
    )  # fmt: skip
    assert record.drop == pytest.approx(100 * (before.float().mean() - after.float().mean()).item(), abs=1e-4)
    assert record.weight_bytes == 3 * (768 * 192 + 4 * 768 + 4 * 768)
    assert record.float_bytes == 4 * 3 * (768 * 192 + 768)


def test_models_end_as_they_began() -> None:
    model, quantized = make()
    before = [(name, id(module)) for both in (model, quantized) for name, module in both.named_modules()]
    mixture = Mixture(model, quantized)
    measure(mixture, subjects(mixture), [IMAGES[:4]])
    assert before == [(name, id(module)) for both in (model, quantized) for name, module in both.named_modules()]
    assert not any(module._forward_hooks for module in model.modules())


def test_full_precision_is_its_own_reference() -> None:
    model, quantized = make(1)
    (record,) = measure(Mixture(model, quantized), [Subject("float", "full precision", ())], [IMAGES])
    assert (record.logits.snr_db, record.logits.kl, record.logits.agreement, record.drop) == (math.inf, 0.0, 1.0, 0.0)


def test_layer_that_gives_nan_is_worse_than_all_others() -> None:
    model, quantized = make()
    quantized.get_submodule(BAD).weight_scale.fill_(float("nan"))
    mixture = Mixture(model, quantized)
    layers = found(measure(mixture, subjects(mixture), [IMAGES]), "layer")
    assert max(layers, key=lambda name: layers[name].logits.kl) == BAD
    assert (layers[BAD].logits.broken, layers[BAD].logits.kl, layers[BAD].drop) == (24, math.inf, 100.0)
    assert all(record.logits.broken == 0 for name, record in layers.items() if name != BAD)


def test_integer_attention_is_measured_apart() -> None:
    """It belongs to no layer: layers alone are measured without it, the whole model and what is protected with it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10).eval()
    swap_attention(model, SdpaConfig().build())
    quantized, plain = copy.deepcopy(model), copy.deepcopy(model)
    for twin, attention in ((quantized, "dynamic"), (plain, "none")):
        Int8Config.model_validate({"attention": attention}).apply(twin, compute_dtype=torch.float32)
        Int8Config().finalize(twin)
    mixture, without = Mixture(model, quantized), Mixture(model, plain)
    assert [subject.kind for subject in subjects(without)].count("rest") == 0
    records = measure(mixture, subjects(mixture), [IMAGES])
    (alone,) = (record for record in records if record.subject.kind == "rest")
    others = {record.subject: record.logits for record in measure(without, subjects(without), [IMAGES])}
    assert 0 < alone.logits.kl < 1e-4
    for record in records:
        if record.subject.kind != "rest":
            same = record.logits == others[record.subject]
            assert same == (record.subject.kind not in ("all", "protect")), record.subject.name


def test_subjects() -> None:
    model, quantized = make()
    chosen = subjects(Mixture(model, quantized))
    assert [subject.name for subject in chosen if subject.kind == "role"] == [
        "patch_embed", "qkv", "proj", "fc1", "fc2", "head",
    ]  # fmt: skip
    ends = {subject.name: subject.layers for subject in chosen if subject.kind == "protect"}
    both = ends["first_block, last_block"]
    assert both == ("patch_embed.proj", *(name for name in both if name.startswith("blocks.1.")), "head")
    assert len(both) == 6
    model, quantized = make(1)
    chosen = subjects(Mixture(model, quantized))
    names = [subject.name for subject in chosen if subject.kind == "protect"]
    assert "first_block" in names
    assert "last_block" not in names, "it is the first"


@pytest.mark.parametrize(
    ("batches", "labels", "text"),
    [([], None, "no images"), ([IMAGES], torch.zeros(23), "23 labels for 24 images")],
)
def test_wrong_images(batches: list[Tensor], labels: Tensor | None, text: str) -> None:
    model, quantized = make(1)
    mixture = Mixture(model, quantized)
    with pytest.raises(UserError, match=text):
        measure(mixture, subjects(mixture), batches, labels)


def test_broken_reference_is_refused() -> None:
    model, quantized = make(1)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    mixture = Mixture(model, quantized)
    with pytest.raises(UserError, match="full-precision model gives NaN"):
        measure(mixture, subjects(mixture), [IMAGES])
