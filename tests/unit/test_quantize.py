"""`quantize` in this process: from a weight file to a model file, evaluated and verified afterwards; its refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vit_efficient import evaluate, export, fit, quantize
from vit_efficient.cli import USER_ERROR
from vit_efficient.data.cache import ensure_digits
from vit_efficient.engine.deployed import load_file as load_model
from vit_efficient.engine.deployed import save_deployed
from vit_efficient.errors import CheckpointError, RecipeError, UserError
from vit_efficient.model.build import build_model
from vit_efficient.model.weights import file_digest
from vit_efficient.quantization.int8_layers import DeployedInt8
from vit_efficient.recipe.load import load_recipe

SMALL = "model.kwargs={patch_size: 8, depth: 1, embed_dim: 48, num_heads: 3}"
MACHINE = ("strategy=single", "strategy.accelerator=cpu", "strategy.micro_batch=32", "data.workers=0")
CALIBRATION = "quantization.calibration={samples: 48}"


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Digits, prepared once, and a width at which messages do not wrap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("COLUMNS", "200")
        ensure_digits()
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small ViT."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    torch.manual_seed(0)
    model = build_model(load_recipe("fp32_sdpa", [SMALL, *MACHINE, "quantization.precision=fp32"]).recipe, 10).model
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_file(model.state_dict(), path)
    return path


def words(weights: Path | None, *more: object, recipe: str = "int8_static_sdpa") -> list[str]:
    given = [] if weights is None else [f"model.weights={weights}"]
    return ["--recipe", recipe, SMALL, *MACHINE, *given, *map(str, more)]


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def model_file(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `quantize` wrote, with its figures beside it: static activations and attention, every layer integer."""
    out = tmp_path_factory.mktemp("made") / "deep" / "model.safetensors"
    more = (CALIBRATION, "quantization.attention=static", "quantization.keep=[]")
    code = quantize.main(words(weights, *more, "--out", out, "--output", out.parent.parent / "figures.json"))
    assert code == 0
    return out


def test_model_file(model_file: Path, weights: Path) -> None:
    """Says what it is and where it came from, and holds integers."""
    made = load_model(model_file)
    assert made.source == {"weights": "w.safetensors", "sha256": file_digest(weights)}
    assert made.recipe.quantization.name == "int8"
    layers = {name: m for name, m in made.model.named_modules() if isinstance(m, DeployedInt8)}
    assert len(layers) == 6
    assert all(layer.input_scale is not None and layer.weight.dtype == torch.int8 for layer in layers.values())
    tensors = load_file(model_file)
    assert "blocks.0.attn.backend.q_scale" in tensors
    assert not any(name.endswith("weight") and t.is_floating_point() and t.ndim > 1 for name, t in tensors.items())
    with safe_open(model_file, framework="pt") as file:
        assert len(file.metadata()["digest"]) == 64


def test_figures(model_file: Path) -> None:
    found = json.loads((model_file.parent.parent / "figures.json").read_text())
    assert found["samples"] == 360
    assert found["weight_bytes"] == model_file.stat().st_size
    assert found["fp32_bytes"] == 4 * load_model(model_file).parameters
    assert found["agreement"] > 0.9
    assert 0 <= found["kl"] < 0.05
    assert found["snr_db"] > 10
    low, high = found["top1_drop_interval"]
    assert low <= found["top1_drop"] <= high
    assert found["top1_drop"] == pytest.approx(found["top1_reference"] - found["top1"], abs=1e-9)


def test_evaluate_counts_the_file_again(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same top-1 of the same images, with no recipe and no weights given."""
    evaluate.main(["--checkpoint", str(model_file), "--output", str(tmp_path / "e.json")])
    again = json.loads((tmp_path / "e.json").read_text())
    figures = json.loads((model_file.parent.parent / "figures.json").read_text())
    assert again["top1"] == pytest.approx(figures["top1"], abs=1e-6)
    assert again["samples"] == 360
    assert again["weight_bytes"] == figures["weight_bytes"]
    assert "as it ships" in printed(capsys)


def test_verify(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize.main(["--verify", str(model_file), *MACHINE]) == 0
    text = printed(capsys)
    assert "blocks.0.mlp.fc2" in text
    assert "patch_embed.proj" in text


def test_verify_refuses_an_altered_file(model_file: Path, tmp_path: Path) -> None:
    whole = bytearray(model_file.read_bytes())
    whole[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match="altered"):
        quantize.main(["--verify", str(tmp_path / "model.safetensors"), *MACHINE])
    with pytest.raises(CheckpointError, match="altered"):
        evaluate.main(["--checkpoint", str(tmp_path / "model.safetensors"), *MACHINE])


def test_what_is_printed(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.safetensors"
    assert quantize.main(words(weights, CALIBRATION, "--out", out)) == 0
    text = printed(capsys)
    assert re.search(r"quantized +int8: 4 of 6 layers", text)
    assert re.search(r"quantized +calibrated on 48 images; largest output errors: blocks\.0\.", text)
    for row in ("top-1", "full precision", "drop", "same prediction", "KL divergence", "logit SNR", "size", "time"):
        assert re.search(rf"{row} ", text), row
    assert f"evaluate --checkpoint {out}" in text


@pytest.mark.parametrize(
    "variant",
    [
        ("quantization=int8",),
        ("quantization=int8", "quantization.weight_bits=4", "quantization.group=32", "quantization.zero_point=true"),
        ("quantization=int4", "quantization.type=int", "quantization.group=32", CALIBRATION),
        ("quantization=int4", "quantization.lora=null"),
        ("quantization=fp8",),
    ],
    ids=["int8 dynamic", "W4A8 groups", "int4 groups", "nf4", "fp8"],
)
def test_other_schemes(variant: tuple[str, ...], weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    assert (
        quantize.main(words(weights, *variant, "--out", out, "--output", tmp_path / "f.json", recipe="int8_sdpa")) == 0
    )
    assert json.loads((tmp_path / "f.json").read_text())["agreement"] > 0.5
    assert load_model(out).source is not None


def test_weight_only_as_onnx_says_that_it_is_floating_point(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    out = tmp_path / "model.safetensors"
    scheme = ("quantization=int4", "quantization.type=int", "quantization.group=32", CALIBRATION)
    quantize.main(words(weights, *scheme, "--out", out, recipe="int8_sdpa"))
    printed(capsys)
    export.main(["onnx", str(out), "--out", str(tmp_path / "model.onnx")])
    ratio = (tmp_path / "model.onnx").stat().st_size / out.stat().st_size
    assert re.search(rf"note +4 layers have quantized weights alone.*{ratio:.1f} times as large", printed(capsys))


def test_the_same_twice(model_file: Path, weights: Path, tmp_path: Path) -> None:
    more = (CALIBRATION, "quantization.attention=static", "quantization.keep=[]")
    quantize.main(words(weights, *more, "--out", tmp_path / "model.safetensors"))
    first, second = load_file(model_file), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(match: str, arguments: list[str], error: type[UserError] = UserError) -> None:
    with pytest.raises(error, match=match):
        quantize.main(arguments)


def test_without_a_recipe_or_a_name(weights: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "m.safetensors")
    for arguments in ([], ["--out", out], words(weights), ["--sensitivity", "--out", out]):
        refused("needs `--recipe R` and `--out MODEL.safetensors`; or `--verify MODEL`", arguments)


def test_without_weights(tmp_path: Path) -> None:
    refused(r"no trained model to quantize.*model\.weights=", words(None, "--out", tmp_path / "m.safetensors"))


def test_with_nothing_to_do(weights: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "m.safetensors")
    refused("quantization=none, so there is nothing to do", words(weights, *out, recipe="fp32_sdpa"))
    adapters = words(weights, "quantization=int4", *out)
    refused(r"comes with adapters to train. Set quantization\.lora=null", adapters)
    assert not list(tmp_path.iterdir())


def test_where_the_file_goes(weights: Path, tmp_path: Path) -> None:
    """Said before anything is computed, and nothing is overwritten."""
    taken = tmp_path / "m.safetensors"
    taken.write_text("mine")
    refused("already exists, and a model is never overwritten", words(weights, "--out", taken))
    assert taken.read_text() == "mine"
    refused(r"this file is called NAME\.safetensors", words(weights, "--out", tmp_path / "m.pt"))


def test_sensitivity_beside_a_written_model(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The order of the README: the model is there already, and is left alone; the measurement is never overwritten."""
    out = tmp_path / "model.safetensors"
    out.write_text("mine")
    sensitivity = words(weights, CALIBRATION, "--sensitivity", "--out", out)
    assert quantize.main(sensitivity) == 0
    assert "drop" in printed(capsys)
    assert out.read_text() == "mine"
    measured = tmp_path / "model.sensitivity.json"
    before = measured.read_bytes()
    refused(r"model\.sensitivity\.json already exists, and is never overwritten", sensitivity)
    measured.unlink()
    refused(r"model\.sensitivity\.png already exists", sensitivity)
    assert len(before) > 1000
    output = [*words(weights, CALIBRATION, "--sensitivity", "--out", tmp_path / "n"), "--output", "f.json"]
    refused(r"they are in n\.sensitivity\.json beside --out: leave out --output", output)


def test_weights_that_are_not_there_or_do_not_fit(weights: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "m.safetensors")
    refused("there is no such file or folder", words(tmp_path / "none.safetensors", *out), CheckpointError)
    other = "model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}"
    with pytest.raises(UserError):
        quantize.main(words(weights, other, *out))
    (tmp_path / "bad.safetensors").write_bytes(weights.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="damaged"):
        quantize.main(words(tmp_path / "bad.safetensors", *out))
    assert not (tmp_path / "m.safetensors").exists()


def test_too_few_images(weights: Path, tmp_path: Path) -> None:
    few = "quantization.calibration={samples: 8}"
    refused("8 images are too few to calibrate on", words(weights, few, "--out", tmp_path / "m.safetensors"))


def test_weights_with_a_nan(weights: Path, tmp_path: Path) -> None:
    state = load_file(weights)
    state["blocks.0.mlp.fc1.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    arguments = words(tmp_path / "nan.safetensors", CALIBRATION, "--out", tmp_path / "m.safetensors")
    refused(r"the weight blocks\.0\.mlp\.fc1\.weight holds a NaN or an infinity. Check `model\.weights`", arguments)
    dynamic = words(tmp_path / "nan.safetensors", "--out", tmp_path / "m.safetensors", recipe="int8_sdpa")
    refused(r"the weight blocks\.0\.mlp\.fc1\.weight holds a NaN", dynamic)
    with pytest.raises(CheckpointError, match="holds a NaN"):
        evaluate.main(words(tmp_path / "nan.safetensors", recipe="int8_sdpa"))
    assert not (tmp_path / "m.safetensors").exists()


def test_a_model_file_that_answers_nan(model_file: Path, tmp_path: Path) -> None:
    """Written whole, by weights that had gone wrong: its figures are refused, not printed."""
    made = load_model(model_file)
    made.model.norm.weight.fill_(float("nan"))
    save_deployed(tmp_path / "nan.safetensors", made.model, made.recipe, made.class_names)
    with pytest.raises(UserError, match=r"evaluation loss is nan: the model gives NaN or infinite logits"):
        evaluate.main(["--checkpoint", str(tmp_path / "nan.safetensors"), *MACHINE])


def test_a_damaged_model_file_is_no_mistake_in_the_recipe(model_file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(model_file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="is damaged") as error:
        evaluate.main(["--checkpoint", str(tmp_path / "cut.safetensors"), *MACHINE])
    assert "in the recipe" not in str(error.value)


def test_fit_from_a_refused_base_leaves_no_folder(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--recipe", "int4_sdpa", SMALL, *MACHINE, "data.batch_size=32"]
    with pytest.raises(
        CheckpointError, match=r"`quantization\.base` is 'none\.safetensors', and there is no such file"
    ):
        fit.main([*base, "quantization.base=none.safetensors"])
    with pytest.raises(UserError, match="is a quantized model file"):
        fit.main([*base, f"quantization.base={model_file}"])
    with pytest.raises(CheckpointError, match=r"`model\.weights` is 'none\.pth'"):
        fit.main(["--recipe", "int8_sdpa", SMALL, *MACHINE, "data.batch_size=32", "model.weights=none.pth"])
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_cannot_run(weights: Path, tmp_path: Path) -> None:
    both = words(weights, "attention=flash2", "quantization.attention=static", "--out", tmp_path / "m.safetensors")
    refused(r"quantization\.attention: is static", both, RecipeError)
    refused(
        "zero_point", words(weights, "quantization.zero_point=true", "--out", tmp_path / "m.safetensors"), RecipeError
    )


def test_verify_wants_a_model_file(weights: Path, tmp_path: Path) -> None:
    refused("there is no such|There is no", ["--verify", str(tmp_path / "none.safetensors")])
    with pytest.raises(UserError):
        quantize.main(["--verify", str(weights), *words(weights)])


def test_help_and_unknown_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        quantize.main(["--help"])
    assert stopped.value.code == 0
    assert "--verify" in printed(capsys)
    refused("no option --senstivity", ["--recipe", "int8_sdpa", "--senstivity"])
    assert USER_ERROR == 2
