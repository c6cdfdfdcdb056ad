"""Saved recipes of runs that knew fewer keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vit_efficient.engine.resume import check_same_recipe
from vit_efficient.errors import CheckpointError
from vit_efficient.recipe.load import dump_recipe, load_recipe

RATE = "model.kwargs={drop_path_rate: 0.2}"


def plain(*words: str) -> dict[str, Any]:
    return load_recipe("fp32_sdpa", words).recipe.model_dump(mode="json")


def old(*words: str) -> dict[str, Any]:
    recipe = plain(*words)
    del recipe["model"]["stochastic_depth"]
    return recipe


def test_a_run_without_a_rate_goes_on() -> None:
    check_same_recipe(old(), plain(), "c")
    check_same_recipe(plain("model.stochastic_depth=mask"), plain(), "c")


def test_a_run_with_a_rate_had_masks() -> None:
    check_same_recipe(old(RATE), plain(RATE, "model.stochastic_depth=mask"), "c")
    with pytest.raises(CheckpointError, match=r"model\.stochastic_depth: 'mask' in the checkpoint, 'subset' now"):
        check_same_recipe(old(RATE), plain(RATE), "c")


def test_the_recipe_in_its_folder_says_so(tmp_path: Path) -> None:
    text = dump_recipe(load_recipe("fp32_sdpa", [RATE]).recipe)
    assert "stochastic_depth: subset" in text
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert load_recipe(str(file)).recipe.model.stochastic_depth == "subset"
    file.write_text("".join(line for line in text.splitlines(keepends=True) if "stochastic_depth" not in line))
    recipe = load_recipe(str(file)).recipe
    assert recipe.model.stochastic_depth == "mask"
    check_same_recipe(old(RATE), recipe.model_dump(mode="json"), "c")


def test_ddp_of_a_run_that_left_its_buckets_to_pytorch(tmp_path: Path) -> None:
    recipe = load_recipe("fp32_sdpa", ["strategy=ddp", "strategy.bucket_mb=null"]).recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    assert "bucket_mb: null" in file.read_text()
    assert load_recipe(str(file)).recipe.strategy == recipe.strategy
