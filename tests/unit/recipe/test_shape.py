"""What the schema looks like from outside."""

from __future__ import annotations

import pytest

from vit_efficient.recipe.schema import Recipe
from vit_efficient.recipe.shape import ROOT, all_keys, all_sections, expected, section_at


def test_sections() -> None:
    found = {".".join(path): section for path, section in all_sections()}
    assert {path for path, section in found.items() if section.discriminated} == {
        "attention",
        "quantization",
        "strategy",
        "data.source",
    }
    named = {path for path, section in found.items() if section.named}
    assert named == {"attention", "quantization", "model", "optim", "strategy", "data.source"}
    assert found["strategy"].default == "auto"
    assert found["attention"].default is None
    assert "quantization.lora" in found


def test_all_keys_are_those_of_a_recipe() -> None:
    keys = {".".join(path) for path in all_keys()}
    assert {"optim.lr", "quantization.lora.rank", "data.source.name", "strategy.devices", "model.kwargs"} <= keys
    assert not any(section_at(tuple(key.split("."))) for key in keys)


def test_a_chosen_member_has_its_own_keys_only() -> None:
    attention = ROOT.child("attention")
    assert attention is not None
    assert "kernel" in attention.fields()
    assert "kernel" not in attention.chosen("flash2").fields()
    assert attention.chosen("nonsense") is attention


@pytest.mark.parametrize(
    ("path", "english"),
    [
        ("optim.lr", "a number above 0"),
        ("optim.epochs", "a whole number of at least 1"),
        ("optim.layer_decay", "a number above 0 and of at most 1"),
        ("optim.clip", "a number above 0 or null"),
        ("augment.flip", "a number from 0 to 1"),
        ("augment.mixup", "a number of at least 0"),
        ("run.seed", "a whole number of at least 0"),
        ("run.dir", "a path or null"),
        ("strategy.compile", "true or false"),
        ("strategy.devices", "a whole number of at least 1 or auto"),
        ("optim.name", "one of adamw, adamw8bit"),
        ("optim.betas", "a list of 2, each a number"),
        ("quantization.keep", "a list, each text or auto"),
        ("quantization.lora.targets", "a list, each one of qkv, proj, fc1, fc2"),
        ("model.kwargs", "a mapping"),
    ],
)
def test_what_a_key_takes(path: str, english: str) -> None:
    *above, key = path.split(".")
    section = section_at(tuple(above))
    assert section is not None
    assert expected(section.fields()[key]) == english


def test_every_key_has_english_and_a_meaning() -> None:
    for path in all_keys():
        section = section_at(path[:-1])
        assert section is not None
        info = section.fields()[path[-1]]
        assert "typing" not in expected(info)
        assert "class" not in expected(info)
        if path[-1] != "name" or not section.discriminated:
            assert info.description, f"{'.'.join(path)} has no description"


def test_the_schema_is_immutable_and_strict() -> None:
    members = [member for _, section in all_sections() for member in section.members]
    for member in [Recipe, *members]:
        assert member.model_config["frozen"]
        assert member.model_config["extra"] == "forbid"
