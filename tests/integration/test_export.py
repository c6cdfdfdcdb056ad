"""`export merge` as a user runs it: a small QLoRA run, merged, requantized, evaluated; and bases that changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vit_efficient import export, fit
from vit_efficient.engine.checkpoint import read_checkpoint
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.model.weights import file_digest
from vit_efficient.quantization.deploy import digest

Command = Callable[..., str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, small: Sequence[str]) -> Path:
    """An epoch of QLoRA with DoRA on a base that `fit` trains first, made once for the tests here."""
    folder = tmp_path_factory.mktemp("qlora")
    once = ["optim.epochs=1" if word.startswith("optim.epochs") else word for word in small]
    words = ["--recipe", "int4_sdpa", *once, "run.dir=run", "quantization.lora.rank=4", "quantization.lora.dora=true",
             "optim.lr=3e-3"]  # fmt: skip
    environment = {**os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "vit_efficient.fit", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder as the working directory, for commands in this process."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT_EFFICIENT_CACHE", str(cache))
    return tmp_path


def last_checkpoint(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / "run" / "checkpoints" / "last.ckpt")


def figures(path: Path) -> dict[str, float]:
    return json.loads(path.read_text())


def test_checkpoints_hold_what_is_trained_and_the_hash_of_the_base(finished: Path) -> None:
    checkpoint = last_checkpoint(finished)
    names = {name.removeprefix("model.") for name in checkpoint["state_dict"]}
    assert {name for name in names if ".lora_" not in name} == {"head.weight", "head.bias"}
    assert any("lora_magnitude_vector" in name for name in names)
    assert checkpoint["base"]["sha256"] == file_digest(finished / checkpoint["base"]["source"])


def test_merged_file_is_evaluated_alone(finished: Path, command: Command, tmp_path: Path) -> None:
    printed = command("export", "merge", str(finished / "run"), "--out", "merged.safetensors")
    assert "8 merged in float32; 8 quantized layers made float" in printed
    found = re.search(r"adapters \+ base by (\S+) of", printed)
    assert found is not None, printed
    assert float(found[1]) < 1e-5
    tensors = load_file(tmp_path / "merged.safetensors")
    assert all(tensor.is_floating_point() for tensor in tensors.values())
    assert not any("lora" in name or "base_layer" in name for name in tensors)
    command("evaluate", "--checkpoint", "merged.safetensors", "--output", "merged.json")
    ours, run = figures(tmp_path / "merged.json"), figures(finished / "run" / "metrics.json")
    assert ours["top1"] == run["top1"]
    assert ours["loss"] == pytest.approx(run["loss"], rel=1e-5)


def test_requantized_file_says_what_it_lost(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.main(["merge", "run", "--out", "four.safetensors", "--requantize", "--images", "200"])
    found = re.search(r"logit SNR (\S+) dB, KL (\S+), agreement (\S+)% \(n = 200\)", capsys.readouterr().out)
    assert found is not None
    assert 3 < float(found[1]) < 60
    assert load_file(here / "four.safetensors")["blocks.0.mlp.fc1.weight"].dtype == torch.uint8
    with pytest.raises(Exception, match=r"merged already, from model\.safetensors"):
        export.main(["merge", "four.safetensors", "--out", "twice.safetensors"])


def test_checkpoint_is_merged_on_its_own_base_only(here: Path) -> None:
    base = Path(last_checkpoint(here)["base"]["source"])
    words = ["merge", "run/checkpoints/last.ckpt", "--out"]
    export.main(["merge", "run", "--out", "file.safetensors"])
    export.main([*words, "checkpoint.safetensors"])
    base.rename("moved.safetensors")
    with pytest.raises(CheckpointError, match="is gone"):
        export.main([*words, "gone.safetensors"])
    export.main([*words, "moved-base.safetensors", "--base", "moved.safetensors"])
    expected = load_file("file.safetensors")
    for name in ("checkpoint.safetensors", "moved-base.safetensors"):
        assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(name).items())

    change(Path("moved.safetensors"))
    with pytest.raises(CheckpointError, match="adapters of another base"):
        export.main([*words, "other.safetensors", "--base", "moved.safetensors"])
    assert not Path("other.safetensors").exists()


def test_a_run_does_not_go_on_with_a_base_that_changed(here: Path) -> None:
    (here / "run" / "metrics.json").unlink()
    base = here / last_checkpoint(here)["base"]["source"]
    change(base)
    with pytest.raises(CheckpointError, match=f"trained on {base.relative_to(here)} with sha256"):
        fit.main(["--resume", "run"])


def test_a_variant_that_trains_nothing_is_refused(here: Path, small: Sequence[str]) -> None:
    with pytest.raises(UserError, match=r"quantization: int4 leaves nothing to train here: set quantization\.lora"):
        fit.main(["--recipe", "int4_sdpa", *small, "quantization.lora=null", "run.dir=new"])
    assert not Path("new").exists()


def change(path: Path) -> None:
    """Another model of the same form: one weight in the last digits, and the digest that goes with it."""
    tensors = load_file(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    tensors["norm.bias"][0] += 1e-3
    save_file(tensors, path, {**metadata, "digest": digest(tensors, metadata)})
