"""timm's pretrained weights: from the cache without a network, and one clear line where there is neither."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from vit_efficient.errors import CheckpointError
from vit_efficient.model.backbone import create_backbone
from vit_efficient.model.hub import fetch, pretrained_name
from vit_efficient.recipe.schema import ModelConfig

REPO = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub at an address where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


def put(cache: Path, repo: str, state: dict[str, torch.Tensor]) -> Path:
    """Lay out a cached repository as the hub's client does."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(state, snapshot / "model.safetensors")
    return snapshot / "model.safetensors"


@pytest.mark.timeout(30)
def test_offline_it_fails_at_once_with_one_line(offline_cache: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        create_backbone(ModelConfig(name="vit_tiny_patch16_224", weights="timm"), 10)
    text = str(error.value)
    assert "\n" not in text
    assert re.search(rf"{REPO}.*not in the local cache.*cannot be reached.*local \.safetensors", text)


@pytest.mark.parametrize("weights", ["timm", "timm:augreg_in21k_ft_in1k"])
def test_cached_weights_need_no_network(offline_cache: Path, weights: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    path = put(offline_cache, REPO, model.state_dict())
    assert fetch("vit_tiny_patch16_224") == (REPO, path)

    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", weights=weights))

    assert backbone.notes == [f"weights from {REPO}"]
    assert torch.equal(backbone.model.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)
    assert backbone.model.num_classes == 1000


def test_the_tag_decides_the_normalisation() -> None:
    means = {
        tag: create_backbone(ModelConfig(name=f"vit_base_patch16_224.{tag}", kwargs={"depth": 1}), 2).image.mean
        for tag in ("augreg_in21k_ft_in1k", "dino")
    }
    assert means == {"augreg_in21k_ft_in1k": (0.5, 0.5, 0.5), "dino": pytest.approx((0.485, 0.456, 0.406))}


def test_unknown_tag_lists_those_that_exist() -> None:
    with pytest.raises(CheckpointError, match=r"'nonsense' of vit_tiny_patch16_224; it has .*augreg_in21k"):
        pretrained_name("vit_tiny_patch16_224", "nonsense")


def test_a_model_without_pretrained_weights_says_so(offline_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="no pretrained weights of vit_base_patch32_plus_256 on the hub"):
        fetch("vit_base_patch32_plus_256")
