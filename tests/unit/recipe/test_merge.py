"""Overrides over files: shorthand, order, resets."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vit_efficient.recipe.merge import Layer, apply, flatten, nest, read_overrides


def layer(content: dict[str, Any]) -> Layer:
    made = Layer()
    for path, value in flatten(content):
        made.set(path, value, "file.yaml:1")
    return made


FILES = {
    "attention": {"name": "sdpa", "kernel": "math"},
    "quantization": {"name": "int8", "precision": "bf16", "keep": ["head"]},
    "model": {"name": "vit_a", "weights": "a.pth", "image_size": 32, "kwargs": {"patch_size": 8, "depth": 6}},
    "data": {"source": "digits", "batch_size": 64},
    "optim": {"lr": 1e-3, "epochs": 5},
}


def merged(*words: str) -> tuple[dict[str, Any], list[str]]:
    overrides, problems = read_overrides(words)
    assert problems == []
    result, notes = apply(overrides, layer(FILES))
    return nest(result.values), notes


def test_shorthand_in_files_and_on_the_command_line() -> None:
    assert dict(flatten({"data": {"source": "folder"}, "model": "vit_b", "optim": "adamw"})) == {
        ("data", "source", "name"): "folder",
        ("model", "name"): "vit_b",
        ("optim", "name"): "adamw",
    }
    assert merged("data.source=folder")[0]["data"] == {"source": {"name": "folder"}, "batch_size": 64}


def test_another_name_drops_what_files_set_and_says_so() -> None:
    found, notes = merged("quantization=int4")
    assert found["quantization"] == {"name": "int4"}
    assert notes == [
        "quantization.name is int4 instead of int8, so dropped what file.yaml set: "
        "quantization.precision, quantization.keep"
    ]


def test_the_same_name_drops_nothing() -> None:
    found, notes = merged("quantization=int8")
    assert found["quantization"] == FILES["quantization"]
    assert notes == []


def test_what_overrides_set_is_never_dropped() -> None:
    found, notes = merged("quantization.keep=[fc1]", "quantization=int4")
    assert found["quantization"] == {"name": "int4", "keep": ["fc1"]}
    assert "keep" not in notes[0]


def test_another_model_drops_its_weights_and_kwargs_only() -> None:
    found, notes = merged("model=vit_b")
    assert found["model"] == {"name": "vit_b", "image_size": 32}
    assert "model.weights, model.kwargs.patch_size, model.kwargs.depth" in notes[0]


def test_another_optimizer_drops_nothing() -> None:
    found, notes = merged("optim=adamw8bit")
    assert found["optim"] == {"name": "adamw8bit", "lr": 1e-3, "epochs": 5}
    assert notes == []


@pytest.mark.parametrize(
    ("word", "kwargs"),
    [
        ("model.kwargs.depth=2", {"patch_size": 8, "depth": 2}),
        ("model.kwargs={depth: 2}", {"depth": 2}),
        ("model.kwargs={}", {}),
        ("model.kwargs=null", None),
    ],
)
def test_a_mapping_is_replaced_and_a_key_of_it_is_set(word: str, kwargs: object) -> None:
    assert merged(word)[0]["model"]["kwargs"] == kwargs


def test_a_section_given_as_a_mapping_is_merged() -> None:
    assert merged("optim={lr: 2, clip: 1.0}")[0]["optim"] == {"lr": 2, "epochs": 5, "clip": 1.0}
    assert merged("optim={}")[0]["optim"] == FILES["optim"]


def test_null_takes_a_whole_section_away_and_an_empty_mapping_makes_one() -> None:
    files = layer({"quantization": {"name": "none", "lora": {"rank": 8}}})
    for word, lora in (("null", None), ("{}", {"rank": 8}), ("{rank: 4}", {"rank": 4})):
        overrides, _ = read_overrides([f"quantization.lora={word}"])
        assert nest(apply(overrides, files)[0].values)["quantization"]["lora"] == lora
    overrides, _ = read_overrides(["quantization.lora={}"])
    assert nest(apply(overrides, layer({"quantization": "none"}))[0].values)["quantization"]["lora"] == {}


WORDS = [
    "quantization=int4", "quantization.keep=[fc1]", "quantization.lora.rank=4", "model=vit_b",
    "model.kwargs={depth: 2}",
    "model.kwargs.qk_norm=true", "data.source=folder", "strategy=ddp", "strategy.devices=2", "optim={lr: 2}",
    "optim.clip=null", "attention={name: flash2}",
]  # fmt: skip


@given(st.permutations(WORDS), st.integers(0, len(WORDS)))
def test_the_order_of_overrides_does_not_matter(words: list[str], count: int) -> None:
    chosen = words[:count]
    shuffled = random.Random(count).sample(chosen, count)
    assert merged(*chosen)[0] == merged(*shuffled)[0]


@pytest.mark.parametrize(
    ("words", "path", "message"),
    [
        (["optim.lr"], "optim.lr", "no `=`"),
        (["=3"], "=3", "no key"),
        (["optim..lr=3"], "optim..lr=3", "no key"),
        (["optim lr=3"], "optim lr=3", "no key"),
        (["--optim.lr=3"], "--optim.lr=3", "no dashes"),
        (["optim.lr="], "optim.lr", "no value"),
        (["optim.lr=[1"], "optim.lr", "not valid YAML"),
        (["optim.lr=1", "optim.lr=2"], "optim.lr", "given twice: 1 and 2"),
        (["attention=sdpa", "attention.name=flash2"], "attention.name", "given twice"),
        (["quantization.lora=null", "quantization.lora.rank=4"], "quantization.lora", "only one can hold"),
    ],
)
def test_malformed_overrides(words: list[str], path: str, message: str) -> None:
    _, problems = read_overrides(words)
    assert [(problem.path, problem.origin) for problem in problems] == [(path, "command line")]
    assert message in problems[0].message


def test_the_same_value_twice_is_no_mistake() -> None:
    assert read_overrides(["optim.lr=1e-3", "optim.lr=0.001"])[1] == []
