"""The attention table: shapes, floors and text; the timing itself needs a GPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from vit_efficient.attention import reference
from vit_efficient.errors import CapabilityError, UserError
from vit_efficient.kernels.int8_attention.op import int8_attend
from vit_efficient.kernels.timing import Timed
from vit_efficient.machine import Gpu, Machine
from vit_efficient.measure import attention
from vit_efficient.measure.attention import LeftOut, Line, errors_of, in_turns, leave_out, render
from vit_efficient.measure.attention_cases import OTHERS, SETS, Case, cases, operands, others, refusals
from vit_efficient.measure.figures import Figures

CPU = torch.device("cpu")
HOPPER = Machine((Gpu("H200", (9, 0), 140 * 2**30),), "580", 8, {"torch": "2.15"})


def test_shapes_by_set_and_by_number() -> None:
    assert cases(["vit"], [16], 64) == [Case(n, b, 16, 64) for n, b in SETS["vit"]]
    assert cases(["1370x64", "qattn"], [12], 80)[0] == Case(1370, 64, 12, 80)
    assert {case.images for case in cases(["qattn"], [12], 64)} == {512}
    for word in ("577", "x64", "577x", "vits", "axb"):
        with pytest.raises(UserError, match=rf"--shapes {word}"):
            cases([word], [16], 64)


def test_both_halves_of_qattns_second_figure_are_one_command() -> None:
    options = attention.parser().parse_args(["--shapes", "qattn", "--heads", "12", "16"])
    found = cases(options.shapes, options.heads, options.width)
    assert {case.heads for case in found} == {12, 16}
    assert len(found) == 2 * len(SETS["qattn"])


def test_every_backend_of_the_package_is_timed_or_refused_with_a_reason() -> None:
    assert {config.name for config in OTHERS.values()} == {"sdpa", "flash2", "flash3", "flash4"}
    refused = refusals(HOPPER, 64)
    assert not any(name.startswith("sdpa") for name in refused)
    assert "flash-attn package is not installed" in refused["flash-attn"]
    for name in ("flash3", "flash4"):
        assert f"`attention: {name}` cannot run" in refused[name]
    q, k, v = operands(Case(5, 2, 3, 16), CPU)
    assert set(others(HOPPER, q, k, v, 0.25)) == set(OTHERS) - set(refused)


def test_backends_behind_the_switch_have_turns_of_their_own() -> None:
    names = ["sdpa flash", "flash3", "int8", "flash4"]
    assert in_turns(names) == [["sdpa flash", "int8"], ["flash3"], ["flash4"]]
    assert in_turns(["int8"]) == [["int8"]]


def test_one_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(5, 2, 3, 16)
    q, k, v = operands(case, CPU)
    exact = reference.attend(*(x[:1].double() for x in (q, k, v)), scale=0.25)

    def refuses() -> torch.Tensor:
        raise CapabilityError("heads of this width\nare not for it")

    def full() -> torch.Tensor:
        raise torch.OutOfMemoryError("3 GiB")

    runs = {"sdpa cudnn": refuses, "flash-attn": full, "int8": partial(int8_attend, q, k, v, scale=0.25)}
    errors, failed = errors_of(runs, exact, CPU)
    assert failed == {
        "sdpa cudnn": "CapabilityError: heads of this width are not for it", "flash-attn": "OutOfMemoryError: 3 GiB",
    }  # fmt: skip
    assert list(errors) == ["int8"]
    assert 0 < errors["int8"] < 0.05
    figures = Figures(tmp_path / "attention.json", {"environment": {}}, ("lines", "left_out"))
    leave_out(figures, LeftOut(None, "flash3", "no such package"))
    leave_out(figures, LeftOut(case, None, failed["flash-attn"]))
    kept = json.loads((tmp_path / "attention.json").read_text())["left_out"]
    assert [one["backend"] for one in kept] == ["flash3", None]
    assert kept[1]["case"] == {"tokens": 5, "images": 2, "heads": 3, "width": 16}
    assert "left out: N 5 B 2 H 3 E 16 all backends: OutOfMemoryError: 3 GiB" in capsys.readouterr().out


def test_without_any_other_there_is_no_ratio() -> None:
    line = Line(Case(5, 2, 3, 16), "int8", Timed(1, 1, 1), 1.0, 1e-3, {})
    assert len(render([line]).split()) == 8 + 1 + 4, "no speed"


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
    rows = render(lines).splitlines()
    width = rows[0].index("sdpa") + 28 + 1 + 9 + 1 + 8 + 1 + 8 + 1
    assert [row[width : width + 6].strip() for row in rows] == ["0.60", "1.00", "1.20"]
    assert "exponentials" in rows[2]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        attention.main(["--shapes", "vit"])


@pytest.mark.gpu
def test_a_table_on_a_gpu(tmp_path: Path) -> None:
    words = ["--shapes", "17x2", "33x1", "--heads", "2", "3", "--repetitions", "3"]
    attention.main([*words, "--output", str(tmp_path / "figures.json")])
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert {(line["case"]["tokens"], line["case"]["heads"]) for line in kept["lines"]} == {
        (17, 2), (33, 2), (17, 3), (33, 3),
    }  # fmt: skip
    timed = {line["backend"] for line in kept["lines"]}
    missing = {one["backend"] for one in kept["left_out"]}
    assert set(OTHERS) <= timed | missing
    assert {"sdpa cudnn", "int8"} <= timed
