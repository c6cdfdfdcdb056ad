"""`export onnx` as a user runs it, and the run's own file verified against what it wrote."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vit_efficient import export
from vit_efficient.engine.deployed import load_file
from vit_efficient.engine.onnx_export import missing_packages
from vit_efficient.engine.verify import run_verify
from vit_efficient.errors import CapabilityError, CheckpointError, UserError

if reason := missing_packages("onnx", "onnxscript", "onnxruntime"):
    pytest.skip(reason, allow_module_level=True)


def test_a_runs_model_as_onnx(
    command: Callable[..., str], small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ["optim.epochs=1" if word.startswith("optim.epochs") else word for word in small]
    command("fit", "--recipe", "int8_sdpa", *once, "run.dir=run")
    printed = command("export", "onnx", "run", "--out", "m.onnx")
    assert "written  m.onnx, " in printed
    assert "`images` (B, 3, 32, 32) float32, normalised with mean (0.5, 0.5, 0.5)" in printed
    deployed = load_file(tmp_path / "run" / "model.safetensors")
    console = Console(file=io.StringIO())
    result = run_verify(deployed.model, deployed.image, [torch.randn(4, 3, 32, 32)], console, onnx=tmp_path / "m.onnx")
    assert result.ok
    assert len(result.layers["onnx"]) == 8

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="already exists"):
        export.main(["onnx", "run", "--out", "m.onnx"])
    with pytest.raises(UserError, match=r"NAME\.onnx"):
        export.main(["onnx", "run", "--out", "m.safetensors"])
    with pytest.raises(CheckpointError, match="no model file"):
        export.main(["onnx", "nowhere", "--out", "n.onnx"])
    command("fit", "--recipe", "int4_sdpa", *once, "run.dir=four")
    with pytest.raises(CapabilityError, match="has an adapter"):
        export.main(["onnx", "four", "--out", "n.onnx"])
    assert not Path("n.onnx").exists()
