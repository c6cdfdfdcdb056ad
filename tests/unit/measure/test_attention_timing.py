"""The attention table: shapes, floors and text; the timing itself needs a GPU."""

from __future__ import annotations

import pytest
import torch

from vit_efficient.errors import UserError
from vit_efficient.kernels.timing import Timed
from vit_efficient.measure import attention
from vit_efficient.measure.attention import SETS, Case, Line, cases, render


def test_shapes_by_set_and_by_number() -> None:
    assert cases(["vit"], 16, 64) == [Case(n, b, 16, 64) for n, b in SETS["vit"]]
    assert cases(["1370x64", "qattn"], 12, 80)[0] == Case(1370, 64, 12, 80)
    assert {case.images for case in cases(["qattn"], 12, 64)} == {512}
    for word in ("577", "x64", "577x", "vits", "axb"):
        with pytest.raises(UserError, match=rf"--shapes {word}"):
            cases([word], 16, 64)


def test_floors_of_an_h200() -> None:
    """By hand: 4 x 16 x 16 x 4096^2 x 64 operations are 1.0995e12; 8-bit 1,979 T/s, bf16 half of that."""
    case = Case(4096, 16, 16, 64)
    assert case.operations == pytest.approx(1.0995e12, rel=1e-4)
    assert case.floors("sdpa cudnn", "NVIDIA H200")["products"] == pytest.approx(1.111, rel=1e-3)
    assert case.floors("int8, float values", "NVIDIA H200")["products"] == pytest.approx(0.833, rel=1e-3)
    assert case.floors("fp8, e4m3 values", "NVIDIA H200")["products"] == pytest.approx(0.556, rel=1e-3)
    assert case.floors("int8", "NVIDIA H200")["exponentials"] == pytest.approx(1.027, rel=1e-3)
    assert case.floors("int8", "NVIDIA H200")["memory"] == pytest.approx(0.112, rel=1e-2)
    assert case.floors("int8", "another chip") == {}


def test_the_best_of_the_others_is_one() -> None:
    case = Case(577, 256, 16, 64)
    times = {"sdpa flash": 2.0, "sdpa cudnn": 1.2, "int8": 1.0}
    lines = [
        Line(case, name, Timed(t, t, t), case.operations / t / 1e9, 1e-3, case.floors(name, "NVIDIA H200"))
        for name, t in times.items()
    ]
    rows = render(lines).splitlines()[1:]
    width = rows[0].index("sdpa") + 28 + 1 + 9 + 1 + 8 + 1 + 8 + 1
    assert [row[width : width + 6].strip() for row in rows] == ["0.60", "1.00", "1.20"]
    assert "exponentials" in rows[2]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        attention.main(["--shapes", "vit"])
