"""The printed table of models: within 80 letters, nothing cut, every figure that people ask for."""

from __future__ import annotations

import io

from rich.console import Console

from vit_efficient.measure.model_table import milliseconds, print_models
from vit_efficient.measure.models import Row

LONG = "int8_static_sdpa quantization.activations=hybrid quantization.keep=[] attention.kernel=cudnn model.pad_tokens=8"
FAST = Row(
    LONG, "compiled-graph", "bfloat16", 256, 1_218_000_000, mean=0.0412, p50=0.0411, p95=0.0423, p99=0.1234, calls=60,
    rounds=(0.04, 0.041), images_per_second=38_870.4, speedup=10.35, speedup_range=(10.2, 10.5),
    peak_bytes=1_730_000_000, steady_bytes=1_610_000_000, compile_mode="max-autotune-no-cudagraphs",
)  # fmt: skip
ON_CPU = Row(
    "small", "eager", "float32", 1, 22_900_000, mean=1.5, p50=1.4, p95=1.6, p99=1.7, calls=3, rounds=(1.4,),
    images_per_second=0.71, speedup=1.0, speedup_range=(1.0, 1.0),
)  # fmt: skip
FAILED = Row("peer", "compiled", "float16", 256, 0, failed="RuntimeError: [1, 2] " + "is no size that it takes " * 9)


def printed(*rows: Row) -> str:
    console = Console(file=io.StringIO(), width=80, highlight=False, color_system=None)
    print_models(console, rows, "vit_large_patch16_224, inference, NVIDIA H200")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_figures_fit_eighty_letters_and_names_are_whole() -> None:
    lines = printed(FAST).splitlines()
    head = next(line for line in lines if "images/s" in line)
    figures = lines[lines.index(head) + 2]
    assert max(len(head), len(figures)) <= 80
    assert dict(zip(head.split(), figures.replace(" GB", "GB").split(), strict=True)) == {
        "images/s": "38,870", "x": "10.35", "range": "10.20-10.50", "mean": "41.2", "p50": "41.1", "p95": "42.3",
        "p99": "123", "weights": "1.22GB", "steady": "1.61GB", "peak": "1.73GB",
    }  # fmt: skip
    assert f"{LONG}  compiled-graph max-autotune-no-cudagraphs, bfloat16" in lines, "brackets and all"


def test_a_reason_is_whole_and_the_first_that_ran_is_named() -> None:
    text = printed(FAILED, FAST, ON_CPU)
    assert f"failed: {FAILED.failed}" in text
    assert f"times as fast as {LONG} (compiled-graph)" in text
    assert text.count("images/s") == 2, "a table a batch size"


def test_what_a_cpu_does_not_know() -> None:
    figures = printed(ON_CPU).splitlines()[4]
    assert figures.split()[-4:] == ["22.9", "MB", "-", "-"]


def test_three_figures() -> None:
    assert [milliseconds(s) for s in (0.0123, 0.00123, 1.5, 0.123)] == ["12.3", "1.23", "1,500", "123"]
