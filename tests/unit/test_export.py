"""`export merge` in this process: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vit_efficient import export
from vit_efficient.data.cache import ensure_digits
from vit_efficient.engine import merging
from vit_efficient.engine.deployed import load_file as load_model
from vit_efficient.engine.deployed import save_deployed
from vit_efficient.engine.subject import find
from vit_efficient.errors import UserError
from vit_efficient.model.build import build_model
from vit_efficient.recipe.load import load_recipe

SMALL = "model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}"
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Digits, prepared once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path_factory.mktemp("cache")))
        ensure_digits()
        yield


def write(path: Path, *words: str, variant: str = "int4_sdpa", precision: str = "fp32") -> Path:
    """The file of a run that has trained a little."""
    machine = ("strategy=single", "strategy.accelerator=cpu", "strategy.micro_batch=32", "data.workers=0")
    recipe = load_recipe(variant, [SMALL, f"quantization.precision={precision}", *machine, *words]).recipe
    torch.manual_seed(0)
    built = build_model(recipe, len(CLASSES))
    with torch.no_grad():
        for parameter in built.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    recipe.quantization.finalize(built.model)
    save_deployed(path, built.model, recipe, CLASSES)
    return path


def run(*words: object) -> None:
    export.main(["merge", *map(str, words)])


@pytest.mark.parametrize("variant", ["int4_sdpa", "lora_sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_file(variant: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "run.safetensors", variant=variant)
    out = tmp_path / "merged.safetensors"
    run(source, "--out", out, "--precision", precision)
    printed = capsys.readouterr().out
    error, stored = (float(re.search(pattern, printed)[1]) for pattern in (  # type: ignore[index]
        r"logits differ from adapters \+ base by (\S+) of", r"as stored.*by (\S+) of"))  # fmt: skip
    assert error < 1e-5
    assert stored < (1e-5 if precision == "fp32" else 2e-2)
    merged = load_model(out)
    assert merged.recipe.quantization.name == "none"
    assert merged.recipe.quantization.precision == precision
    assert merged.class_names == CLASSES
    expected = torch.float32 if precision == "fp32" else torch.bfloat16
    assert load_file(out)["blocks.0.mlp.fc1.weight"].dtype == expected
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(merged.model(x), load_model(source).model(x), rtol=0, atol=10 * stored)
    assert find(str(out)) == (out, out)  # `evaluate --checkpoint` needs no other file
    assert load_recipe(str(out)).recipe == merged.recipe


def test_precision_follows_the_run(tmp_path: Path) -> None:
    for precision, expected in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")):
        out = tmp_path / f"{precision}-merged.safetensors"
        run(write(tmp_path / f"{precision}.safetensors", precision=precision), "--out", out)
        assert load_model(out).recipe.quantization.precision == expected


@pytest.mark.parametrize(
    "words",
    [
        ["quantization.train=critical", "quantization.critical=[first_block, norms]"],
        ["quantization=bnb_int8", "quantization.lora={rank: 4}"],
    ],
    ids=["critical", "int8"],
)
def test_requantized_by_the_scheme_of_the_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "run.safetensors", *words)
    out = tmp_path / "again.safetensors"
    run(source, "--out", out, "--requantize", "--images", 100)
    found = re.search(r"SNR (\S+) dB, KL (\S+), agreement (\S+)% \(n = 100\)", capsys.readouterr().out)
    assert found is not None
    assert 5 < float(found[1]) < 60
    tensors = load_file(out)
    packed = {name for name, tensor in tensors.items() if tensor.dtype in (torch.uint8, torch.int8) and tensor.ndim > 1}
    first = any(name.startswith("blocks.0.") for name in packed)
    assert packed
    assert first == ("bnb_int8" in words[0])  # a critical layer stays in full precision
    assert load_model(out).recipe.quantization.lora is None  # type: ignore[union-attr]


def test_merged_twice(tmp_path: Path) -> None:
    source = write(tmp_path / "run.safetensors")
    run(source, "--out", tmp_path / "merged.safetensors")
    run(source, "--out", tmp_path / "four.safetensors", "--requantize", "--images", 10)
    for name in ("merged", "four"):
        with pytest.raises(UserError, match=r"was merged already, from run\.safetensors \(sha256 [0-9a-f]{12}"):
            run(tmp_path / f"{name}.safetensors", "--out", tmp_path / "twice.safetensors")
    assert not (tmp_path / "twice.safetensors").exists()


def test_refusals(tmp_path: Path) -> None:
    source = write(tmp_path / "run.safetensors")
    trained = write(tmp_path / "int8.safetensors", variant="int8_sdpa")
    lora = write(tmp_path / "lora.safetensors", variant="lora_sdpa")
    damaged, weights = tmp_path / "damaged.safetensors", tmp_path / "weights.safetensors"
    damaged.write_bytes(source.read_bytes()[:-100])
    save_file({"head.weight": torch.zeros(2, 2)}, weights)
    (tmp_path / "loose.ckpt").touch()
    out = tmp_path / "out.safetensors"
    for words, text in [
        ([trained, "--out", out], "quantization=int8 without `lora` trains the weights themselves"),
        ([lora, "--out", out, "--requantize"], "not quantized"),
        ([damaged, "--out", out], "damaged"),
        ([weights, "--out", out], "not a model that this package deployed"),
        ([tmp_path / "nowhere", "--out", out], "no such file"),
        ([tmp_path / "loose.ckpt", "--out", out], "recipe is missing"),
        ([source, "--out", tmp_path / "out.pth"], r"NAME\.safetensors"),
        ([source, "--out", source], "never overwritten"),
        ([source, "--out", out, "--precision", "fp16"], "invalid choice: 'fp16'"),
        ([source, "--out", out, "--base", weights], "--base is for checkpoints"),
        ([source, "--out", out, "--images", "5"], "are for --requantize"),
        ([source, "--out", out, "--requantize", "--images", "0"], "at least one"),
        ([source, "--out", out, "--requantize", "--shards", tmp_path / "none"], "none"),
        ([source], "required: --out"),
    ]:
        with pytest.raises(UserError, match=text):
            run(*words)
    assert not out.exists()


def test_garbage_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dequantization gone wrong, as by a repacked weight, is seen by comparing answers."""
    source = write(tmp_path / "run.safetensors")
    out = tmp_path / "out.safetensors"
    real = merging.merge

    def wrong(model: torch.nn.Module) -> Any:
        done = real(model)
        weight = model.blocks[0].mlp.fc1.weight  # type: ignore[index, union-attr]
        weight.data = weight.data.flip(0)
        return done

    monkeypatch.setattr(merging, "merge", wrong)
    with pytest.raises(UserError, match="do not answer as adapters and base do"):
        run(source, "--out", out)
    assert not out.exists()


def test_the_file_says_what_it_was_made_of(tmp_path: Path) -> None:
    source, out = write(tmp_path / "run.safetensors"), tmp_path / "merged.safetensors"
    run(source, "--out", out)
    with safe_open(out, framework="pt") as file:
        assert '"adapters": "8"' in file.metadata()["merged"]
