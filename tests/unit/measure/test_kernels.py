"""The table of kernel timings: floors, bytes, the products of QAttn's figure, and what is kept of a run cut short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vit_efficient.errors import UserError
from vit_efficient.kernels.timing import Timed, summary
from vit_efficient.kernels.tuning import Shape
from vit_efficient.measure import kernels, qattn
from vit_efficient.measure.figures import Figures
from vit_efficient.measure.kernels import kind_of, measure_group
from vit_efficient.measure.roofline import HEAD, Line, Rates, datasheet, render

CPU = torch.device("cpu")
LINE = Line("fc1", "int8_linear plain", "1x2x3", "int8", operations=1e12, bytes=1e9, time=Timed(2.0, 1.9, 2.2))


def test_the_floor_is_the_larger_of_arithmetic_and_memory() -> None:
    rates = Rates(operations=2e12, bytes=1e12)
    assert rates.floor(4e12, 1e12) == 2000
    assert rates.floor(1e12, 3e12) == 3000


def test_a_datasheet_by_kind_of_number() -> None:
    sheet = datasheet("NVIDIA H200")
    assert sheet is not None
    assert {kind: rates.operations for kind, rates in sheet.items()} == {
        "int8": 1979e12, "fp8": 1979e12, "half": 989.5e12, "fp32": 67e12,
    }  # fmt: skip
    assert datasheet("another chip") is None


def test_bytes_of_a_layer() -> None:
    shape = Shape(10, 20, 30)
    operands = 10 * 20 + 30 * 20
    assert kernels.bytes_moved("int8_linear", "plain", shape) == operands + 2 * 300
    assert kernels.bytes_moved("int8_linear", "gelu_quant", shape) == operands + 300
    assert kernels.bytes_moved("fp8_linear", "residual", shape) == operands + 4 * 300
    packed = 30 * 20 / 2 + 30 * 3  # codes; a bf16 scale and a byte of zero point for the one group of each output
    assert kernels.bytes_moved("int4_linear", "plain", shape) == 2 * 200 + packed + 2 * 300


def test_what_is_multiplied() -> None:
    words = (("int8_linear", "gelu"), ("fp8_linear_fast", "gelu"), ("int4_linear", "plain"), ("int4_linear", "token"))
    assert [kind_of(*each) for each in words] == ["int8", "fp8", "half", "int8"]


def test_the_table_says_how_far_from_the_floor() -> None:
    rates = {"int8": Rates(1e15, 4e12)}
    row = render(LINE, {"int8": Rates(2e15, 4e12)}, rates).split()
    assert row[-1] == "50.0%"
    assert row[-5:-3] == ["500.0", "0.50"]
    assert "0.5000" in row  # by the datasheet
    other = Line("fc1", "int8_linear plain", "1x2x3", "fp8", 1e12, 1e9, Timed(2.0, 1.9, 2.2))
    assert len(render(other, None, rates).split()) == len(row) - 3, "a chip without fp8 has no floor for it"
    assert len(HEAD) == len(render(LINE, rates, rates))


def test_medians_and_spread() -> None:
    found = summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.low, found.high) == (3.0, 1.0, 5.0)


def test_the_products_of_qattns_first_figure() -> None:
    """ViT-B/16 at 224 pixels has 14 x 14 + 1 tokens, ViT-L/32 at 384 has 12 x 12 + 1."""
    found = {(model, layer, batch): str(shape) for model, layer, batch, shape in qattn.shapes()}
    assert len(found) == 2 * 4 * 8
    assert found["ViT-B/16/224", "qkv", 1] == "197x768x2304"
    assert found["ViT-B/16/224", "fc1", 2048] == "403456x768x3072"
    assert found["ViT-L/32/384", "fc2", 32] == "4640x4096x1024"
    assert found["ViT-L/32/384", "proj", 256] == "37120x1024x1024"


def test_qattns_variants_compute_what_they_are_called() -> None:
    torch.manual_seed(0)
    variants = qattn.variants(Shape(6, 64, 32), CPU)
    assert list(variants) == ["fp32", "fp16", "int8 dynamic", "int8 static"]
    made = {name: work() for name, (*_, work) in variants.items()}
    wanted = made["fp32"]
    assert wanted.dtype == torch.float32
    for name, dtype in (("fp16", torch.float16), ("int8 dynamic", torch.float16)):
        assert made[name].dtype == dtype
        assert 0 < float((made[name] - wanted).norm() / wanted.norm()) < 0.03
    assert made["int8 static"][0].dtype == torch.int8, "codes in and codes out"
    sizes = {name: size for name, (_, size, _) in variants.items()}
    assert sizes == {"fp32": (4, 4, 4), "fp16": (2, 2, 2), "int8 dynamic": (2, 1, 2), "int8 static": (1, 1, 1)}


def test_what_was_asked_for_in_parts() -> None:
    def names(*words: str) -> list[str]:
        return [name for name, _ in kernels.groups(kernels.parser().parse_args(words), CPU)]

    assert names("--batch", "1", "--op", "int4_linear") == [
        f"{what}, 1 images" for what in ("qkv", "proj", "fc1", "fc2", "rows")
    ]
    asked = names("--shapes", "qattn")
    assert len(asked) == 64
    assert asked[0] == "ViT-B/16/224 qkv, 1 images"


def test_a_width_that_is_not_whole_heads_is_refused() -> None:
    for width in ("224", "32"):
        with pytest.raises(UserError, match="a --width that is a multiple of 64"):
            kernels.main(["--width", width, "--op", "int4_linear", "int8_linear"])
    kernels.check(kernels.parser().parse_args(["--width", "224", "--op", "int4_linear"]))
    kernels.check(kernels.parser().parse_args(["--width", "192", "--op", "int8_linear"]))


def test_what_does_not_fit_leaves_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> list[Line]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    def interrupted() -> list[Line]:
        raise KeyboardInterrupt

    figures = Figures(path := tmp_path / "new" / "kernels.json", {"environment": {"gpu": 1}}, ("lines", "left_out"))
    measure_group("fc1, 1 images", lambda: [LINE], figures, lambda line: line.variant)
    measure_group("fc2, 2048 images", full, figures, lambda line: line.variant)
    with pytest.raises(KeyboardInterrupt):
        measure_group("fc1, 4096 images", interrupted, figures, lambda line: line.variant)
    kept = json.loads(path.read_text())
    assert kept["environment"] == {"gpu": 1}
    assert [(line["variant"], line["group"], line["time"]["median"]) for line in kept["lines"]] == [
        ("int8_linear plain", "fc1, 1 images", 2.0)
    ]
    reason = "out of memory: CUDA out of memory. Tried to allocate 9 GiB"
    assert kept["left_out"] == [{"what": "fc2, 2048 images", "reason": reason}]
    assert f"left out: fc2, 2048 images: {reason}" in capsys.readouterr().out
    assert [each.name for each in path.parent.iterdir()] == ["kernels.json"], "no temporary file stays"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        kernels.main(["--shapes", "qattn"])


@pytest.mark.gpu
def test_a_table_of_all_operators_on_a_gpu(tmp_path: Path) -> None:
    words = [
        "--op",
        "int8_linear",
        "int4_linear",
        "--batch",
        "1",
        "--tokens",
        "17",
        "--width",
        "128",
        "--hidden",
        "256",
    ]
    kernels.main([*words, "--hidden", "256", "--output", str(tmp_path / "figures.json")])
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert not kept["left_out"]
    variants = {line["variant"] for line in kept["lines"] if line["what"] == "fc1"}
    assert {"int8_linear gelu", "int8_linear gelu_quant", "int4_linear token", "torch linear bf16"} <= variants
    assert all(line["time"]["median"] > 0 for line in kept["lines"])
