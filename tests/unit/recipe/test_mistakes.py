"""Every mistake is found, all at once, with its place, what is allowed and the nearest spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_efficient.errors import Problem, RecipeError
from vit_efficient.recipe.load import load_recipe

VARIANT = "protocol: protocol.yaml\nattention: sdpa\nquantization: int8\n"
PROTOCOL = "model: vit_tiny_patch16_224\ndata: {source: digits, batch_size: 64}\noptim: {lr: 1e-3, epochs: 5}\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a sound variant.yaml and protocol.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "variant.yaml").write_text(VARIANT)
    (tmp_path / "protocol.yaml").write_text(PROTOCOL)
    return tmp_path


def problems(*words: str, recipe: str = "variant.yaml") -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, words)
    return caught.value.problems


def problem(*words: str, recipe: str = "variant.yaml") -> Problem:
    found = problems(*words, recipe=recipe)
    assert len(found) == 1, [str(each) for each in found]
    return found[0]


def test_the_files_of_these_tests_are_sound() -> None:
    assert load_recipe("variant.yaml").recipe.variant == "variant"


@pytest.mark.parametrize(
    ("word", "path", "suggestion"),
    [
        ("atention=sdpa", "atention", "attention"),
        ("attention.kernl=math", "attention.kernl", "attention.kernel"),
        ("optm.lr=1", "optm.lr", "optim.lr"),
        ("lr=1", "lr", "optim.lr"),
        ("workers=1", "workers", "data.workers"),
        ("data.lr=1", "data.lr", "optim.lr"),
        ("precision=bf16", "precision", "quantization.precision"),
        ("batchsize=1", "batchsize", "data.batch_size"),
        ("keep=[head]", "keep", ""),
        ("qqq.www=1", "qqq", ""),
        ("optim.lr.x=1", "optim.lr.x", ""),
    ],
)
def test_unknown_keys(word: str, path: str, suggestion: str) -> None:
    found = problem(word)
    assert (found.path, found.suggestion, found.origin) == (path, suggestion, "command line")


def test_a_key_that_several_sections_have_is_told_with_all_of_them() -> None:
    assert "quantization.keep, checkpoint.keep" in problem("keep=[head]").message


def test_a_key_of_another_member() -> None:
    found = problem("attention=flash2", "attention.kernel=math")
    assert found.message == "flash2 has no key 'kernel', only sdpa"
    assert found.allowed == "name"


@pytest.mark.parametrize(
    ("word", "path", "message", "allowed", "suggestion"),
    [
        ("attention=flsh2", "attention.name", "unknown attention backend 'flsh2'", "sdpa, flash2", "flash2"),
        ("quantization=int9", "quantization.name", "unknown quantization backend 'int9'", "none, int8, int4", "int8"),
        ("strategy=dp", "strategy.name", "unknown strategy 'dp'", "single, ddp, fsdp, deepspeed, auto", "ddp"),
        ("optim.epochs=abc", "optim.epochs", "must be a whole number of at least 1, got 'abc'", "", ""),
        ("optim.epochs=0", "optim.epochs", "must be a whole number of at least 1, got 0", "", ""),
        ("optim.epochs=1e2", "optim.epochs", "must be a whole number of at least 1, got 100.0", "", "100"),
        ("optim.epochs=true", "optim.epochs", "must be a whole number of at least 1, got true", "", ""),
        ("optim.epochs=null", "optim.epochs", "must be a whole number of at least 1, got null", "", ""),
        ("optim.lr=.inf", "optim.lr", "must be a number above 0, got Infinity", "", ""),
        ("optim.ema=1", "optim.ema", "must be a number above 0 and below 1 or null, got 1", "", ""),
        ("augment.flip=2", "augment.flip", "must be a number from 0 to 1, got 2", "", ""),
        ("optim.name=adam", "optim.name", "must be one of adamw, adamw8bit, got 'adam'", "", "adamw"),
        ("optim.betas=[1]", "optim.betas", "must be a list of 2, each a number, got [1]", "", ""),
        (
            "optim.betas=[0.9, 1]",
            "optim.betas",
            "must be two numbers of at least 0 and below 1, got [0.9, 1.0]",
            "",
            "",
        ),
        ("quantization.keep=head", "quantization.keep", "must be a list, each text or auto, got 'head'", "", "[head]"),
        (
            "quantization.keep=[head, 1]",
            "quantization.keep",
            'must be a list, each text or auto, got ["head", 1]',
            "",
            "",
        ),
        ("strategy.compile=on", "strategy.compile", "must be true or false, got 'on'", "", "true"),
        ("model.weights=1", "model.weights", "must be text or null, got 1", "", '"1"'),
        ("model.kwargs=3", "model.kwargs", "must be a mapping, got 3", "", ""),
        ("run.dir=[a]", "run.dir", 'must be a path or null, got ["a"]', "", ""),
        (
            "optim.warmup_epochs=9",
            "optim.warmup_epochs",
            "is 9, longer than the whole run: optim.epochs=5. Make it shorter too: optim.warmup_epochs=0",
            "",
            "",
        ),
        ("optim.min_lr=1", "optim.min_lr", "is 1, above the peak optim.lr=0.001", "", ""),
        ("augment.crop_scale=[1, 0.5]", "augment.crop_scale", "must be [smallest, largest]", "", ""),
        ("augment.crop_ratio=[0, 1]", "augment.crop_ratio", "must be [smallest, largest]", "", ""),
        ("attention={kernel: math}", None, "", "", ""),
        ("data=3", "data", "must be a section, got 3", "source, shards", ""),
        ("attention=3", "attention", "must be a section or a name, got 3", "sdpa, flash2", ""),
        ("variant=x", "variant", "is what --recipe names", "", ""),
        ("protocol=3", "protocol", "must be a name or a path, got 3", "", ""),
    ],
)
def test_wrong_values(word: str, path: str | None, message: str, allowed: str, suggestion: str) -> None:
    if path is None:
        assert load_recipe("variant.yaml", [word]).recipe.attention.name == "sdpa"
        return
    found = problem(word)
    assert found.path == path
    assert found.message.startswith(message)
    assert found.allowed.startswith(allowed)
    assert found.suggestion == suggestion
    assert found.origin == "command line"


def test_a_choice_of_types_is_one_problem() -> None:
    found = problem("strategy=ddp", "strategy.devices=two")
    assert found.message == "must be a whole number of at least 1 or auto, got 'two'"


def test_adapters_base_without_adapters() -> None:
    assert "quantization.lora is unset" in problem("quantization=none", "quantization.base=runs/x").message


def test_missing_keys_name_the_file_that_owns_them(place: Path) -> None:
    (place / "protocol.yaml").write_text("model: vit_tiny_patch16_224\noptim: {lr: 1e-3}\n")
    (place / "variant.yaml").write_text("protocol: protocol.yaml\nattention: {kernel: math}\n")
    found = {each.path: each for each in problems()}
    assert set(found) == {"attention.name", "quantization", "data", "optim.epochs"}
    assert found["quantization"].origin == "variant.yaml"
    assert found["attention.name"].message == "is missing: it says which attention backend"
    assert found["attention.name"].origin == "variant.yaml:2"
    assert found["data"].origin == "protocol.yaml"
    assert found["optim.epochs"].message == "is missing; it must be a whole number of at least 1"


def test_a_misspelt_key_is_not_called_missing_too(place: Path) -> None:
    (place / "protocol.yaml").write_text(PROTOCOL.replace("epochs", "epoch"))
    found = problem()
    assert (found.path, found.suggestion, found.origin) == ("optim.epoch", "optim.epochs", "protocol.yaml:3")


def test_who_owns_what(place: Path) -> None:
    (place / "variant.yaml").write_text(VARIANT + "optim: {lr: 1}\nstrategy: ddp\n")
    (place / "protocol.yaml").write_text(PROTOCOL + "attention: flash2\nrun: {seed: 3}\n")
    found = {each.path: each for each in problems()}
    assert set(found) == {"optim", "strategy", "attention", "run"}
    assert "owned by a protocol file. The command line may set anything" in found["optim"].message
    assert "depends on where it runs" in found["strategy"].message
    assert found["optim"].origin == "variant.yaml:4"
    assert found["attention"].allowed == "model, data, augment, optim"
    assert found["run"].origin == "protocol.yaml:5"


def test_keys_with_dots_belong_on_the_command_line(place: Path) -> None:
    (place / "protocol.yaml").write_text(PROTOCOL + "optim.clip: 1\n")
    found = problem()
    assert found.suggestion == "optim: {clip: ...}"


@pytest.mark.parametrize(
    ("content", "origin", "message"),
    [
        (b"", "protocol.yaml", "is empty"),
        (b"# nothing\n", "protocol.yaml", "is empty"),
        (b"- a\n", "protocol.yaml", "holds list data"),
        (b"a: [1\n", "protocol.yaml:2", "not valid YAML"),
        (b"optim: {lr: 1, lr: 2}\n", "protocol.yaml:1", "twice"),
        (b"\xff\xfe\x00", "protocol.yaml", "not a text file in UTF-8"),
        (None, "protocol.yaml", "is a folder"),
    ],
)
def test_files_that_cannot_be_read(place: Path, content: bytes | None, origin: str, message: str) -> None:
    (place / "protocol.yaml").unlink()
    if content is None:
        (place / "protocol.yaml").mkdir()
    else:
        (place / "protocol.yaml").write_bytes(content)
    found = problems("optim.epochs=0")
    assert (found[0].origin, message in found[0].message) == (origin, True)
    assert [each.path for each in found[1:]] == ["optim.epochs"]  # and what the unread file holds is not missing


def test_a_run_folder_says_which_file_is_meant(place: Path) -> None:
    (place / "runs/x").mkdir(parents=True)
    (place / "runs/x/recipe.yaml").write_text("a: b\n")
    assert "it holds recipe.yaml: name that file" in problem(recipe="runs/x").message


@pytest.mark.parametrize(
    ("recipe", "words", "path", "message", "suggestion"),
    [
        ("int8_spda", [], "--recipe", "there is no variant 'int8_spda'", "int8_sdpa"),
        ("recipes/int8_spda.yaml", [], "--recipe", "there is no file 'recipes/int8_spda.yaml'", "int8_sdpa"),
        ("nowhere/x.yaml", [], "--recipe", "there is no file 'nowhere/x.yaml'", ""),
        ("digits", [], "--recipe", "'digits' is a protocol, not a variant", ""),
        ("protocol.yaml", [], "--recipe", "this is a protocol, not a variant", ""),
        ("", [], "--recipe", "there is no", ""),
        ("int8_sdpa", ["protocol=digts"], "protocol", "there is no protocol 'digts'", "digits"),
        ("int8_sdpa", ["protocol=int8_sdpa"], "protocol", "'int8_sdpa' is a variant, not a protocol", ""),
    ],
)
def test_unknown_files(recipe: str, words: list[str], path: str, message: str, suggestion: str) -> None:
    found = problem(*words, recipe=recipe)
    assert (found.path, found.suggestion) == (path, suggestion)
    assert found.message.startswith(message)


def test_a_variant_that_names_no_protocol(place: Path) -> None:
    (place / "variant.yaml").write_text(VARIANT.replace("protocol: protocol.yaml\n", ""))
    assert problem().message == "is missing; name one in the file, or write protocol=NAME"
    assert load_recipe("variant.yaml", ["protocol=digits"]).recipe.protocol == "digits"
    (place / "variant.yaml").write_text(VARIANT.replace("protocol.yaml", "digts"))
    assert (problem().origin, problem().suggestion) == ("variant.yaml:1", "digits")


def test_all_mistakes_at_once(place: Path) -> None:
    (place / "variant.yaml").write_text(VARIANT.replace("int8", "{name: int8, kep: [head]}") + "modle: x\n")
    (place / "protocol.yaml").write_text(PROTOCOL.replace("64", "many").replace("1e-3", "-1"))
    with pytest.raises(RecipeError) as caught:
        load_recipe("variant.yaml", ["attention=flsh2", "optim.clip=x", "nonsense", "run.sed=1", "keep=[head]"])
    assert {each.path for each in caught.value.problems} == {
        "quantization.kep", "modle", "data.batch_size", "optim.lr", "attention.name", "optim.clip", "nonsense",
        "run.sed", "keep",
    }  # fmt: skip
    text = str(caught.value)
    assert text.startswith("9 mistakes in the recipe\n")
    assert "  data.batch_size: must be a whole number of at least 1, got 'many'\n    set in   protocol.yaml:2" in text
    assert "did you mean 'run.seed'?" in text
    assert "pydantic" not in text


def test_inside_an_unknown_backend_keys_are_checked_against_all() -> None:
    assert {each.path for each in problems("attention=flsh2", "attention.kernl=x")} == {
        "attention.name",
        "attention.kernl",
    }
