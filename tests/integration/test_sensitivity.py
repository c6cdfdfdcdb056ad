"""Sensitivity of the pretrained ViT-Ti on real images: a layer that was spoilt is found, and `keep: auto` saves it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.engine.sensitivity import choose_keep, run_sensitivity
from vit_efficient.engine.setup import build_data, build_transforms
from vit_efficient.engine.subject import from_weights
from vit_efficient.machine import detect
from vit_efficient.quantization.base import AutoKeep
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.recipe.compat import resolve
from vit_efficient.recipe.load import load_recipe

pytestmark = pytest.mark.slow
Command = Callable[..., str]
BAD = "blocks.5.mlp.fc2"
BATCH, BATCHES = 8, 3


@pytest.mark.long
def test_pretrained_vit(command: Command, shared: Callable[[str], Path], tmp_path: Path) -> None:
    """24 images: int8 with a scale a token hurts no layer, so all that is lost is lost in the layer of noise."""
    images = shared("data/ILSVRC2012_sample_train.tar")
    weights = shared("weights/vit_tiny_patch16_224.safetensors")
    command("prepare", "imagenet", "--train", str(images), "--out", "in1k")
    words = (
        "protocol=imagenet_vit_l16", "model.name=vit_tiny_patch16_224", f"model.weights={weights}",
        f"data.eval_shards={tmp_path / 'in1k' / 'train'}", "data.eval_resize=256", f"data.eval_batch_size={BATCH}",
        "data.workers=0", "strategy.accelerator=cpu", "quantization.precision=fp32",
    )  # fmt: skip
    recipe, _ = resolve(load_recipe("fp32_sdpa", words).recipe, detect())
    data: ViTDataModule = build_data(recipe)
    subject = from_weights(recipe, data.num_classes)
    data.image = subject.image
    transforms = build_transforms(recipe, subject.image, data.num_classes).eval()
    batches, labels = [], []
    for batch, _ in zip(data.val_dataloader(), range(BATCHES), strict=False):
        batches.append(transforms(batch)[0])
        labels.append(batch["label"])

    quantized = copy.deepcopy(subject.model)
    Int8Config().apply(quantized, compute_dtype=torch.float32)
    Int8Config().finalize(quantized)
    weight = quantized.get_submodule(BAD).weight
    weight.copy_(torch.randint(-127, 128, weight.shape, generator=torch.Generator().manual_seed(0)))
    console = Console(width=140, record=True, file=io.StringIO())
    arguments = (subject.model, quantized, batches, torch.cat(labels))
    records = run_sensitivity(*arguments, tmp_path / "model.safetensors", console)
    layers = {record.subject.name: record for record in records if record.subject.kind == "layer"}
    assert len(layers) == 48
    ranked = sorted(layers, key=lambda name: layers[name].logits.kl)
    assert ranked[-1] == BAD
    assert layers[BAD].logits.snr_db < 15 < min(layers[name].logits.snr_db for name in ranked[:-1])
    reference, everything = records[0], records[1]
    assert reference.top1 is not None
    assert reference.top1 >= 0.7
    assert everything.logits.agreement < 1

    keep = choose_keep(*arguments, AutoKeep(max_drop=1), console, records=records)
    assert keep == ("patch_embed.proj", BAD, "head")
    print(console.export_text())
