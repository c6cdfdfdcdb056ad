"""A model file carries its recipe, and can be given for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vit_efficient.errors import CheckpointError
from vit_efficient.recipe.load import load_recipe

TENSORS = {"weight": torch.zeros(2)}


def test_recipe_of_a_model_file_with_overrides(tmp_path: Path) -> None:
    recipe = load_recipe("int4_sdpa", ["quantization.lora.dora=true"]).recipe
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"recipe": recipe.model_dump_json()})
    assert load_recipe(str(path)).recipe == recipe
    changed = load_recipe(str(path), ["data.workers=0"]).recipe
    assert changed == recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0})})


@pytest.mark.parametrize(
    ("metadata", "text"),
    [(None, "holds weights and no recipe"), ({"recipe": "{"}, "cannot be read"), ({"recipe": "3"}, "cannot be read")],
)
def test_files_without_one(metadata: dict[str, str] | None, text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata)
    with pytest.raises(CheckpointError, match=text):
        load_recipe(str(path))


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged, or no safetensors file") as error:
        load_recipe(str(path))
    assert "in the recipe" not in str(error.value)
