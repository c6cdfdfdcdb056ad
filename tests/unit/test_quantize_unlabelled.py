"""`quantize` and `evaluate` where the data has other classes than the model: images without labels."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vit_efficient import evaluate, quantize
from vit_efficient.data.preparation import prepare_source
from vit_efficient.data.sources.base import Source
from vit_efficient.data.sources.csv_list import Files
from vit_efficient.engine.deployed import load_file as load_model
from vit_efficient.errors import UserError
from vit_efficient.model.build import build_model
from vit_efficient.model.weights import file_digest
from vit_efficient.recipe.load import load_recipe

SMALL = "model.kwargs={patch_size: 8, depth: 1, embed_dim: 48, num_heads: 3}"
MACHINE = ("strategy=single", "strategy.accelerator=cpu", "strategy.micro_batch=32", "data.workers=0")
CLASSES = 10  # of the weights
IMAGES = {"train": 48, "val": 40}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small ViT of ten classes, whose answers depend on the image."""
    path = tmp_path_factory.mktemp("weights") / "timm_vit.safetensors"
    torch.manual_seed(0)
    recipe = load_recipe("fp32_sdpa", [SMALL, *MACHINE, "quantization.precision=fp32"]).recipe
    model = build_model(recipe, CLASSES).model
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name != "pos_embed":
            parameter.data += 0.5 * torch.randn_like(parameter)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module", params=[1, 3], ids=["one class", "three classes"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise in as many classes, whose names mean nothing to the model."""
    folder, number, splits = tmp_path_factory.mktemp("shards"), np.random.default_rng(0), {}
    for split, count in IMAGES.items():
        names = [f"{split}{index}.png" for index in range(count)]
        for name in names:
            coarse = number.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32)).save(folder / name)
        splits[split] = Files(folder, names, np.arange(count, dtype=np.int64) % request.param)
    classes = [f"kind{index}" for index in range(request.param)]
    prepare_source(Source("csv", classes, splits, {"images": sum(IMAGES.values())}), folder / "shards")
    return folder / "shards"


def words(weights: Path, shards: Path, *more: object, recipe: str = "int8_sdpa") -> list[str]:
    given = (f"model.weights={weights}", f"data.shards={shards}", f"model.num_classes={CLASSES}")
    return ["--recipe", recipe, SMALL, *MACHINE, *given, *map(str, more)]


def made(out: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What `quantize` prints, and its figures."""
    assert quantize.main([*arguments, "--out", str(out), "--output", str(out.with_suffix(".json"))]) == 0
    return capsys.readouterr().out, json.loads(out.with_suffix(".json").read_text())


def test_no_accuracy_is_made_of_labels_that_mean_nothing(
    weights: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, figures = made(tmp_path / "m.safetensors", words(weights, shards), capsys)
    assert figures["samples"] == IMAGES["val"]
    assert figures["agreement"] > 0.9
    assert not [key for key in figures if key.startswith("top1")]
    assert "40, whose labels are not the model's classes: no top-1" in text
    assert not re.search(r"top-1 +\d|drop +[+-]|counts it again|warning", text)
    assert load_model(tmp_path / "m.safetensors").class_names == [str(number) for number in range(CLASSES)]


def test_keep_auto_goes_by_agreement(
    weights: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that four bits destroy is warned of; asked to, layers are kept until it agrees again."""
    bits = ("quantization.weight_bits=4", "quantization.activation_bits=4", "quantization.weights=tensor")
    text, plain = made(tmp_path / "plain.safetensors", words(weights, shards, *bits, "quantization.keep=[]"), capsys)
    assert plain["agreement"] < 0.8
    assert f"warning  only {plain['agreement']:.0%} of the predictions are those of full precision" in text
    auto = (*bits, "quantization.keep=auto", "quantization.budget.max_drop=20")
    text, figures = made(tmp_path / "auto.safetensors", words(weights, shards, *auto), capsys)
    assert re.search(r"keep: auto keeps [1-5] of 6 layers", text)
    assert text.count("no labels, agreement") == 2
    assert figures["agreement"] > plain["agreement"]


def test_sensitivity_without_labels(weights: Path, shards: Path, tmp_path: Path) -> None:
    assert quantize.main(words(weights, shards, "--sensitivity", "--out", tmp_path / "m.safetensors")) == 0
    records = json.loads((tmp_path / "m.sensitivity.json").read_text())["records"]
    assert all(record["top1"] is None for record in records)


def test_evaluate_says_that_nothing_can_be_counted(weights: Path, shards: Path) -> None:
    """Before anything is calibrated."""
    with pytest.raises(UserError, match=r"single class|The model has 10 classes and the data 3.*data\.eval_shards"):
        evaluate.main(words(weights, shards))


def test_evaluate_a_file_on_other_classes(weights: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    quantize.main(words(weights, shards, "--out", out))
    with pytest.raises(UserError, match=r"single class|The model has 10 classes and the data 3"):
        evaluate.main(["--checkpoint", str(out), f"data.eval_shards={shards}", "data.shards=null", *MACHINE])


def test_a_head_that_nobody_trained(weights: Path, shards: Path, tmp_path: Path) -> None:
    given = [word for word in words(weights, shards, "--out", tmp_path / "m.safetensors") if "num_classes" not in word]
    with pytest.raises(UserError, match=r"have 10 classes, the data [13]: .*Set model\.num_classes=10\."):
        quantize.main(given)
    with pytest.raises(UserError, match=r"have 10 classes, model\.num_classes is 7: .*Set model\.num_classes=10\."):
        quantize.main([*given, "model.num_classes=7"])
    state = load_file(weights)
    save_file({name: tensor for name, tensor in state.items() if "head" not in name}, tmp_path / "body.safetensors")
    with pytest.raises(UserError, match="have no classifier"):
        quantize.main(words(tmp_path / "body.safetensors", shards, "--out", tmp_path / "m.safetensors"))
    with pytest.raises(UserError, match=r"single class|have 10 classes, the data 3: .*Set model\.num_classes=10\."):
        evaluate.main([word for word in given if word not in ("--out", str(tmp_path / "m.safetensors"))])
    assert not (tmp_path / "m.safetensors").exists()


def test_the_source_of_a_file_whose_name_begins_like_the_hubs(weights: Path, shards: Path, tmp_path: Path) -> None:
    quantize.main(words(weights, shards, "--out", tmp_path / "m.safetensors"))
    source = load_model(tmp_path / "m.safetensors").source
    assert source is not None
    assert source["weights"] == "timm_vit.safetensors"
    assert source["sha256"] == file_digest(weights)


def test_the_source_of_weights_of_the_hub(
    weights: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name there, and the hash of the file in the cache."""
    repo = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    snapshot = tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    shutil.copy(weights, snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    given = [word for word in words(weights, shards) if not word.startswith("model.weights")]
    named = ("model.name=vit_tiny_patch16_224", SMALL, "model.weights=timm", "model.image_size=32")
    quantize.main([*given, *named, "--out", str(tmp_path / "m.safetensors")])
    assert load_model(tmp_path / "m.safetensors").source == {"weights": repo, "sha256": file_digest(weights)}
