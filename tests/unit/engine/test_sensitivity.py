"""Sensitivity as a command runs it: the table, the files beside the model, and the decision of `keep: auto`."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import timm
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from vit_efficient.engine.sensitivity import choose_keep, run_sensitivity
from vit_efficient.quantization.base import AutoKeep
from vit_efficient.quantization.int8 import Int8Config

BAD = "blocks.1.mlp.fc1"
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def make() -> tuple[nn.Module, nn.Module]:
    """A float model, and an int8 one in which a layer's codes are noise."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10).eval()
    quantized = copy.deepcopy(model)
    Int8Config().apply(quantized, compute_dtype=torch.float32)
    Int8Config().finalize(quantized)
    weight = quantized.get_submodule(BAD).weight
    weight.copy_(torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(3)))
    return model, quantized


def test_table_picture_and_figures(tmp_path: Path) -> None:
    """The folder is made; the names follow the model's."""
    model, quantized = make()
    console = Console(width=160, record=True, file=io.StringIO())
    out = tmp_path / "made" / "model.safetensors"
    labels = model(IMAGES).argmax(1)
    records = run_sensitivity(model, quantized, IMAGES.split(8), labels, out, console, title="vit, int8")
    printed = console.export_text()
    assert "vit, int8: sensitivity, 24 images" in printed
    assert "first_block, last_block" not in printed, "that would leave nothing quantized"
    assert str(out.with_name("model.sensitivity.json")) in printed
    saved = json.loads((out.parent / "model.sensitivity.json").read_text())["records"]
    assert [entry["name"] for entry in saved] == [record.subject.name for record in records]
    layers = [entry for entry in saved if entry["kind"] == "layer"]
    assert max(layers, key=lambda entry: entry["kl"])["name"] == BAD
    assert len(layers) == 8
    whole = next(entry for entry in saved if entry["kind"] == "all")
    assert whole["top1"] == whole["agreement"] < 1, "the labels are what the float model says"
    with Image.open(out.parent / "model.sensitivity.png") as picture:
        assert picture.width > 1000


def test_choice_is_explained(tmp_path: Path) -> None:
    """It spares the measuring where the records are given, and says where the images are too few for the limit."""
    model, quantized = make()
    quiet = Console(file=io.StringIO())
    records = run_sensitivity(model, quantized, [IMAGES], None, tmp_path / "m", quiet)
    console = Console(width=200, record=True, file=io.StringIO())
    keep = choose_keep(model, quantized, [IMAGES], None, AutoKeep(max_drop=2), console, records=records)
    assert keep == ("patch_embed.proj", BAD, "head")
    printed = console.export_text()
    assert f"keeps 1 of 8 layers: {BAD}" in printed
    assert "no labels, agreement 100.0 %" in printed
    assert "24 images tell drops apart in steps of 4.17 points, more than max_drop=2" in printed
    assert "runs" not in printed, "nothing was measured again but joint models"
