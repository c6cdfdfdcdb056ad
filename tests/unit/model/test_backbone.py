"""Models as a recipe asks for them: weights put in, sizes adapted, and everything that was changed said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from vit_efficient.data.image import ImageSpec
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.model.backbone import create_backbone
from vit_efficient.recipe.schema import ModelConfig

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def saved(path: Path, name: str = "vit_tiny_patch16_224", **arguments: Any) -> str:
    """The file of a small timm model with weights of its own."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, "num_classes": 7, "img_size": 64, **arguments})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_file(model.state_dict(), path)
    return str(path)


def config(name: str = "vit_tiny_patch16_224", **more: Any) -> ModelConfig:
    kwargs = {**SMALL, **more.pop("kwargs", {})}
    return ModelConfig(name=name, kwargs=kwargs, **{"image_size": 64, **more})


def test_random_weights_are_said() -> None:
    backbone = create_backbone(config(), 5)
    assert backbone.notes == ["no weights given: initialised at random"]
    assert backbone.weights_digest is None
    assert backbone.model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_weights_that_fit_are_loaded_whole(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors")
    backbone = create_backbone(config(weights=path), 7)
    assert backbone.notes == [f"weights from {path}"]
    assert backbone.weights_digest is not None
    other = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=7, img_size=64, checkpoint_path=path)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone.model.eval()(x), other.eval()(x))


@pytest.mark.parametrize(("asked", "argument", "expected"), [(None, None, 7), (None, 4, 4), (3, None, 3), (3, 4, 3)])
def test_class_count_of_recipe_then_data_then_weights(
    tmp_path: Path, asked: int | None, argument: int | None, expected: int
) -> None:
    path = saved(tmp_path / "w.safetensors")
    backbone = create_backbone(config(weights=path, num_classes=asked), argument)
    assert backbone.model.head.out_features == expected
    said = [note for note in backbone.notes if "`head`" in note]
    assert said == ([] if expected == 7 else [f"`head` re-initialised: 7 -> {expected} classes"])


def test_without_weights_the_default_is_that_of_timm() -> None:
    assert create_backbone(config()).model.num_classes == 1000


def test_a_reinitialised_head_keeps_the_rest(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors")
    torch.manual_seed(3)
    fresh = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=4, img_size=64)
    torch.manual_seed(3)
    got = create_backbone(config(weights=path), 4).model.state_dict()
    loaded = create_backbone(config(weights=path), 7).model.state_dict()
    for name, tensor in got.items():
        wanted = fresh.state_dict() if name.startswith("head.") else loaded
        assert torch.equal(tensor, wanted[name]), name


def test_both_heads_of_distilled_deit(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", "deit_tiny_distilled_patch16_224")
    notes = create_backbone(config("deit_tiny_distilled_patch16_224", weights=path), 4).notes
    assert notes[1:] == [
        "`head` re-initialised: 7 -> 4 classes",
        "`head_dist` re-initialised: 7 -> 4 classes",
    ]


def test_weights_without_a_head_are_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", num_classes=0)
    assert create_backbone(config(weights=path), 4).notes[1:] == [
        "the weights have no `head`: initialised for 4 classes"
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "old", "new"),
    [
        ("vit_tiny_patch16_224", {}, "4x4", "2x2"),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, "4x4", "2x2"),
        ("deit3_small_patch16_224", {}, "4x4", "2x2"),
        ("deit_tiny_distilled_patch16_224", {}, "4x4", "2x2"),
        ("eva02_tiny_patch14_224", {"patch_size": 16}, "4x4", "2x2"),
    ],
)
def test_position_embeddings_are_resized_and_that_is_said(
    tmp_path: Path, name: str, arguments: dict[str, Any], old: str, new: str
) -> None:
    path = saved(tmp_path / "w.safetensors", name, **arguments)
    large = create_backbone(config(name, weights=path, kwargs=arguments), 7)
    small = create_backbone(config(name, weights=path, kwargs=arguments, image_size=32), 7)
    assert large.notes[1:] == []
    assert small.notes[1:] == [f"position embeddings resized {old} -> {new}"]
    prefix = 0 if getattr(large.model, "no_embed_class", False) else large.model.num_prefix_tokens
    expected = resample_abs_pos_embed(large.model.pos_embed, [2, 2], num_prefix_tokens=prefix)
    assert torch.allclose(small.model.pos_embed, expected)
    assert small.image.size == 32
    assert small.model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_rotary_positions_need_no_resizing(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", "vit_small_patch16_dinov3")
    backbone = create_backbone(config("vit_small_patch16_dinov3", weights=path, image_size=32), 7)
    assert backbone.notes == [f"weights from {path}"]
    assert backbone.model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_relative_positions_are_resized_and_that_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", "beit_base_patch16_224")
    backbone = create_backbone(config("beit_base_patch16_224", weights=path, image_size=96), 7)
    assert backbone.notes[1:] == ["relative position biases resized in 2 blocks"]
    assert backbone.model(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_another_patch_size_is_resized_and_that_is_said(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors")
    backbone = create_backbone(config(weights=path, kwargs={"patch_size": 8}), 7)
    assert set(backbone.notes[1:]) == {
        "patch embedding resized 16x16 -> 8x8 pixels",
        "position embeddings resized 4x4 -> 8x8",
    }


def test_weights_of_another_model_name_the_keys(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", depth=3)
    with pytest.raises(CheckpointError) as error:
        create_backbone(config(weights=path), 7)
    text = str(error.value)
    assert "does not fit the model vit_tiny_patch16_224" in text
    assert "not in the model (12): blocks.2.attn.proj.bias, " in text
    assert text.count("blocks.2.") == 10
    assert "and 2 more" in text
    assert "missing" not in text


def test_weights_of_another_width_name_the_shapes(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.safetensors", embed_dim=96)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.proj\.bias \(float32 96, wanted float32 48\)"):
        create_backbone(config(weights=path), 7)


def test_missing_weights_are_named_and_not_left_at_random(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=7, img_size=64)
    state = model.state_dict()
    del state["blocks.1.mlp.fc1.weight"], state["head.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"missing \(2\): blocks\.1\.mlp\.fc1\.weight, head\.bias"):
        create_backbone(config(weights=str(path)), 7)


def test_integer_codes_in_place_of_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=7, img_size=64)
    state = {**model.state_dict(), "blocks.1.mlp.fc1.weight": torch.zeros(192, 48, dtype=torch.int8)}
    torch.save(state, path)
    with pytest.raises(
        CheckpointError, match=r"fc1\.weight \(int8 192x48, wanted float32 192x48\)[\s\S]*codes of a quantized"
    ):
        create_backbone(config(weights=str(path)), 7)


def test_adapters_are_recognised(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(4, 48)}, path)
    with pytest.raises(CheckpointError, match="low-rank adapters"):
        create_backbone(config(weights=str(path)), 7)


def test_layer_scales_of_original_deit3_files(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    model = timm.create_model("deit3_small_patch16_224", **SMALL, num_classes=7, img_size=64)
    state = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t for n, t in model.state_dict().items()
    }
    torch.save({"model": state}, path)
    assert create_backbone(config("deit3_small_patch16_224", weights=str(path)), 7).notes == [f"weights from {path}"]


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("vit_tiny_patch16_225", "vit_tiny_patch16_224"),
        ("deit3_smal_patch16_224", "deit3_small_patch16_224"),
        ("hf-hub:someone/something", "list_models"),
        ("local-dir:somewhere", "list_models"),
    ],
)
def test_unknown_name_is_answered_with_near_ones(name: str, suggestion: str) -> None:
    with pytest.raises(UserError, match=rf"timm has no model '{name}'.*{suggestion}"):
        create_backbone(ModelConfig(name=name), 2)


@pytest.mark.parametrize("name", ["resnet10t", "mixer_s32_224"])
def test_other_families_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="not a Vision Transformer"):
        create_backbone(ModelConfig(name=name), 2)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"no_such_thing": 1}, "no_such_thing"),
        ({"num_heads": 5}, "divisible"),
        ({"num_classes": 3}, r"model\.num_classes"),
        ({"img_size": 32}, r"model\.image_size"),
        ({"checkpoint_path": "x.pth"}, r"model\.weights"),
        ({"pretrained": True}, r"model\.weights: timm"),
    ],
)
def test_arguments_that_timm_or_the_recipe_refuses(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        create_backbone(config(kwargs=kwargs), 2)


@pytest.mark.parametrize(("size", "remedy"), [(60, "48 or 64"), (7, "Take 16")])
def test_image_size_must_be_a_multiple_of_the_patch(size: int, remedy: str) -> None:
    with pytest.raises(UserError, match=rf"`model\.image_size` is {size}.*{remedy}"):
        create_backbone(config(image_size=size), 2)


def test_image_spec_is_that_of_the_models_own_config() -> None:
    half = (0.5, 0.5, 0.5)
    assert create_backbone(ModelConfig(name="vit_tiny_patch16_224", kwargs=SMALL), 2).image == ImageSpec(
        size=224, mean=half, std=half, interpolation="bicubic", crop_pct=0.9
    )
    deit3 = create_backbone(config("deit3_small_patch16_224"), 2).image
    assert deit3.size == 64
    assert deit3.mean == pytest.approx((0.485, 0.456, 0.406))
    assert create_backbone(config("vit_small_patch14_reg4_dinov2", image_size=56), 2).image.crop_pct == 1.0


def test_shared_vit_tiny_loads_with_its_image_spec(shared: Callable[[str], Path]) -> None:
    path = str(shared("weights/vit_tiny_patch16_224.safetensors"))
    backbone = create_backbone(ModelConfig(name="vit_tiny_patch16_224", weights=path))
    assert backbone.notes == [f"weights from {path}"]
    assert backbone.model.num_classes == 1000
    assert backbone.image.mean == backbone.image.std == (0.5, 0.5, 0.5)
    assert backbone.weights_digest is not None
    assert backbone.weights_digest.startswith("2b9cb78a")
    small = create_backbone(ModelConfig(name="vit_tiny_patch16_224", weights=path, image_size=32), 10)
    assert small.notes[1:] == ["position embeddings resized 14x14 -> 2x2", "`head` re-initialised: 1000 -> 10 classes"]
