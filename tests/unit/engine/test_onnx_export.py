"""Exported files: the same codes in ONNX Runtime, under every scheme, and what is refused."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from vit_efficient.data.image import ImageSpec
from vit_efficient.engine import onnx_export
from vit_efficient.engine.onnx_export import export_onnx, floating_layers, missing_packages
from vit_efficient.engine.onnx_run import OnnxRun
from vit_efficient.engine.parts import integer_layers
from vit_efficient.engine.tally import VerifyResult
from vit_efficient.engine.verify import run_verify
from vit_efficient.errors import CapabilityError, CheckpointError, UserError

if reason := missing_packages("onnx", "onnxscript", "onnxruntime"):
    pytest.skip(reason, allow_module_level=True)

import onnx
import onnxruntime

BYTES = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
Make = Callable[..., nn.Module]
IMAGE = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def verify(model: nn.Module, path: Path) -> tuple[VerifyResult, str]:
    console = Console(file=io.StringIO(), width=200)
    result = run_verify(model, IMAGE, [images()], console, onnx=path)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def exported(integer_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has all schemes in its layers, exported once."""
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    size = export_onnx(integer_model("all"), IMAGE, path)
    assert size == path.stat().st_size
    assert list(path.parent.iterdir()) == [path]
    return path


def test_every_scheme_has_the_same_codes(integer_model: Make, exported: Path) -> None:
    model = integer_model("all")
    assert len({layer.scheme for layer in integer_layers(model).values()}) == 5
    result, printed = verify(model, exported)
    assert result.ok, printed
    assert list(result.layers["onnx"]) == list(integer_layers(model))
    assert all(tally.share == 1 and tally.output < 1e-6 for tally in result.layers["onnx"].values())
    assert "onnx, fused keep their bounds" in printed


def test_layers_of_quantized_weights_alone_are_known(integer_model: Make) -> None:
    layers = integer_layers(integer_model())
    assert floating_layers(integer_model("W4")) == list(layers)
    assert floating_layers(integer_model()) == []


def test_the_batch_is_free_and_weights_are_bytes(integer_model: Make, exported: Path) -> None:
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    model = integer_model("all")
    for count in (1, 5):
        with torch.no_grad():
            own = model(images(count))
        logits = torch.from_numpy(session.run(None, {"images": images(count).numpy()})[0])
        assert (logits - own).norm() / own.norm() < 0.05  # of whole runs; `verify` compares layer by layer
    stored = [w for w in onnx.load(exported).graph.initializer if w.data_type in BYTES]
    weights = sum(layer.weight_codes().numel() for layer in integer_layers(model).values())
    assert 0 <= sum(math.prod(w.dims) for w in stored) - weights <= 1  # and the sign bit


def test_signed_products_are_right_where_the_processor_has_them(integer_model: Make, tmp_path: Path) -> None:
    """Right or found out: never wrong and verified."""
    model, path = integer_model(), tmp_path / "m.onnx"
    export_onnx(model, IMAGE, path, products="signed")
    result, _ = verify(model, path)
    same = all(tally.output < 1e-5 for tally in result.layers["onnx"].values())
    assert result.ok == same


def changed(path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path.with_name("changed.onnx"))
    return path.with_name("changed.onnx")


def test_another_rounding_in_one_layer_is_caught_and_named(integer_model: Make, exported: Path) -> None:
    def floor(graph: Any) -> None:
        rounds = [node for node in graph.node if node.op_type == "Round"]
        assert len(rounds) == 5
        rounds[2].op_type = "Floor"

    result, printed = verify(integer_model("all"), changed(exported, floor))
    assert {(backend, layer) for backend, layer, _ in result.failures} == {("onnx", "blocks.0.attn.proj")}
    assert "broken: onnx, blocks.0.attn.proj: " in printed


def test_a_file_of_other_weights_is_caught(integer_model: Make, exported: Path) -> None:
    result, _ = verify(integer_model("all", seed=1), exported)
    assert result.failures[0][:2] == ("onnx", "patch_embed.proj")


def test_a_file_of_another_model_is_refused(integer_model: Make, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.proj.*3 of 8"):
        verify(integer_model("all", depth=2), exported)
    (tmp_path / "x.onnx").write_bytes(b"not a model at all")
    with pytest.raises(CheckpointError, match=r"x\.onnx"):
        OnnxRun(tmp_path / "x.onnx", [])
    with pytest.raises(CheckpointError, match=r"absent\.onnx"):
        OnnxRun(tmp_path / "absent.onnx", [])


def test_what_has_no_onnx_form_is_refused(integer_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_efficient.quantization.int4_layers import FrozenLinear4bit

    model = integer_model()
    frozen = FrozenLinear4bit.empty((48, 48), False, type="nf4", double_quant=False, compute_dtype=torch.float32)
    model.blocks[0].attn.proj = frozen  # type: ignore[union-attr, index]
    with pytest.raises(CapabilityError, match=r"blocks\.0\.attn\.proj.*FrozenLinear4bit"):
        export_onnx(model, IMAGE, tmp_path / "m.onnx")
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    with pytest.raises(UserError, match="2 GiB"):
        export_onnx(integer_model(), IMAGE, tmp_path / "m.onnx")
    monkeypatch.setattr(onnx_export, "PACKAGES", ("no_such_package",))
    with pytest.raises(CapabilityError, match=r"no_such_package.*pip install -e '\.\[export\]'"):
        export_onnx(integer_model(), IMAGE, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
