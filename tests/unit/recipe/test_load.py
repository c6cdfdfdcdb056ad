"""Where files are found, who owns what, complete recipes, and the provenance of every value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_efficient.errors import RecipeError
from vit_efficient.recipe import files
from vit_efficient.recipe.load import dump_recipe, load_recipe
from vit_efficient.recipe.schema import Recipe

PROTOCOL = """\
model: {name: vit_tiny_patch16_224, image_size: 32, kwargs: {patch_size: 8}}
data:
  source: digits
  batch_size: 64
optim: {lr: 1e-3, epochs: 5}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, away from the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["int8_sdpa", "recipes/int8_sdpa.yaml", str(files.packaged() / "int8_sdpa.yaml")])
@pytest.mark.parametrize("protocol", ["digits", "recipes/protocols/digits.yaml"])
def test_what_ships_is_found_from_anywhere(place: Path, name: str, protocol: str) -> None:
    recipe = load_recipe(name, [f"protocol={protocol}"]).recipe
    assert (recipe.variant, recipe.protocol) == ("int8_sdpa", "digits")
    assert recipe.quantization.name == "int8"
    assert recipe.data.source.name == "digits"


def test_a_file_here_comes_before_what_ships(place: Path) -> None:
    write(
        place / "recipes/int8_sdpa.yaml",
        "protocol: digits\nattention: sdpa\nquantization: {name: int8, keep: [head]}\n",
    )
    assert load_recipe("recipes/int8_sdpa.yaml").recipe.quantization.keep == ("head",)  # type: ignore[union-attr]
    assert load_recipe("int8_sdpa").recipe.quantization.keep == ("patch_embed", "head")  # type: ignore[union-attr]


def test_a_variant_of_ones_own_with_a_protocol_of_ones_own(place: Path) -> None:
    write(place / "study/protocols/mine.yaml", PROTOCOL)
    write(place / "study/other.yaml", PROTOCOL.replace("epochs: 5", "epochs: 7"))
    variant = write(place / "study/a.yaml", "protocol: mine\nattention: sdpa\nquantization: none\n")
    assert load_recipe("study/a.yaml").recipe.optim.epochs == 5
    assert load_recipe("study/a.yaml", ["protocol=digits"]).recipe.protocol == "digits"
    variant.write_text(variant.read_text().replace("mine", "other.yaml"))  # from the folder of the file that says it
    recipe = load_recipe("study/a.yaml").recipe
    assert (recipe.variant, recipe.protocol, recipe.optim.epochs) == ("a", "other", 7)
    assert load_recipe("int8_sdpa", ["protocol=study/other.yaml"]).recipe.optim.epochs == 7  # from the working folder


def test_every_value_knows_where_it_was_set(place: Path) -> None:
    write(place / "p.yaml", PROTOCOL)
    origins = load_recipe("int8_sdpa", ["protocol=p.yaml", "optim.lr=2e-3", "strategy.micro_batch=8"]).origins
    assert origins["data.batch_size"] == "p.yaml:4"
    assert origins["data.source.name"] == "p.yaml:3"
    assert origins["optim.epochs"] == "p.yaml:5"
    assert origins["optim.lr"] == origins["strategy.micro_batch"] == "command line"
    assert origins["quantization.name"].startswith(str(files.packaged() / "int8_sdpa.yaml:"))
    assert "optim.ema" not in origins
    assert "strategy.name" not in origins  # nobody set it


def test_a_section_without_a_name_means_its_default() -> None:
    strategy = load_recipe("int8_sdpa", ["strategy.micro_batch=8"]).recipe.strategy
    assert (strategy.name, strategy.micro_batch) == ("auto", 8)


def test_notes_of_what_was_dropped_reach_the_caller() -> None:
    loaded = load_recipe("int8_sdpa", ["quantization=none"])
    assert len(loaded.notes) == 1
    assert "quantization.keep" in loaded.notes[0]
    assert loaded.recipe.quantization.name == "none"


def test_a_complete_recipe_gives_the_same_recipe(place: Path) -> None:
    words = [
        "protocol=imagenet_vit_l16",
        "run.dir=runs/x",
        "data.audit=a.txt",
        "strategy=ddp",
        "quantization.lora=null",
    ]
    recipe = load_recipe("lora_sdpa", words).recipe
    write(place / "recipe.yaml", dump_recipe(recipe))
    again = load_recipe("recipe.yaml")
    assert again.recipe == recipe
    assert again.notes == []
    assert again.recipe.variant == "lora_sdpa"


def test_a_complete_recipe_takes_overrides_but_no_other_protocol(place: Path) -> None:
    write(place / "recipe.yaml", dump_recipe(load_recipe("int8_sdpa").recipe))
    loaded = load_recipe("recipe.yaml", ["optim.lr=5", "strategy=ddp", "protocol=digits"])
    assert loaded.recipe.optim.lr == 5
    assert "strategy.micro_batch" in loaded.notes[0]
    with pytest.raises(RecipeError, match="complete recipe; start from a variant"):
        load_recipe("recipe.yaml", ["protocol=cifar10"])
    write(place / "new.yaml", dump_recipe(load_recipe("int8_sdpa").recipe).replace("resolved: 1", "resolved: 2"))
    with pytest.raises(RecipeError, match="resolved: is 2; this version"):
        load_recipe("new.yaml")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e30, 1e30) | TEXT
KWARGS = st.dictionaries(
    TEXT, PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(TEXT, PLAIN, max_size=3), max_size=4
)


@settings(max_examples=60, deadline=None)
@given(kwargs=KWARGS, weights=st.none() | TEXT, lr=st.floats(1e-30, 1e30), keep=st.lists(TEXT, max_size=3))
def test_dump_and_load_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, kwargs: dict[str, Any], weights: str | None, lr: float, keep: list[str]
) -> None:
    recipe = load_recipe("int8_sdpa").recipe
    made = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"kwargs": kwargs, "weights": weights}),
            "optim": recipe.optim.model_copy(update={"lr": lr}),
            "quantization": recipe.quantization.model_copy(update={"keep": tuple(keep)}),
        }
    )
    path = tmp_path_factory.mktemp("dump") / "recipe.yaml"
    path.write_text(dump_recipe(made), encoding="utf-8")
    again = load_recipe(str(path)).recipe
    assert again == made
    assert json.dumps(again.model.kwargs, sort_keys=True) == json.dumps(
        kwargs, sort_keys=True
    )  # 1, 1.0 and true differ


def test_a_wheel_carries_its_recipes_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(files.packaged(), tmp_path / "site/vit_efficient/recipes")
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site/vit_efficient/recipe/files.py"))
    assert files.packaged() == tmp_path / "site/vit_efficient/recipes"
    assert load_recipe("int8_sdpa").recipe.variant == "int8_sdpa"


def test_the_recipe_cannot_be_changed() -> None:
    recipe: Recipe = load_recipe("int8_sdpa").recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.optim.lr = 1.0  # type: ignore[misc]
