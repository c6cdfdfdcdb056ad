"""The table of kernel timings: floors, bytes, and what is said without a GPU."""

from __future__ import annotations

import pytest
import torch

from vit_efficient.errors import UserError
from vit_efficient.kernels.cases import FORMS, OPS, block_layers, linear_case
from vit_efficient.kernels.timing import Timed, summary
from vit_efficient.kernels.tuning import Shape
from vit_efficient.measure import kernels
from vit_efficient.measure.kernels import Line, Rates


def test_the_floor_is_the_larger_of_arithmetic_and_memory() -> None:
    rates = Rates(operations=2e12, bytes=1e12)
    assert rates.floor(4e12, 1e12) == 2000
    assert rates.floor(1e12, 3e12) == 3000


def test_bytes_of_a_layer() -> None:
    shape = Shape(10, 20, 30)
    operands = 10 * 20 + 30 * 20
    assert kernels.bytes_moved("plain", shape) == operands + 2 * 300
    assert kernels.bytes_moved("gelu_quant", shape) == operands + 300
    assert kernels.bytes_moved("residual", shape) == operands + 4 * 300


def test_the_table_says_how_far_from_the_floor() -> None:
    line = Line("fc1", "int8_linear plain", "1x2x3", operations=1e12, bytes=1e9, time=Timed(2.0, 1.9, 2.2))
    text = kernels.render([line], Rates(2e15, 4e12), {"int8": Rates(1e15, 4e12)})
    row = text.splitlines()[1].split()
    assert row[-1] == "50.0%"
    assert row[-5:-3] == ["500.0", "0.50"]
    assert "0.5000" in row  # by the datasheet


def test_medians_and_spread() -> None:
    found = summary([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.low, found.high) == (3.0, 1.0, 5.0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("form", FORMS)
def test_every_case_runs(form: str, op: str) -> None:
    result = linear_case(op, form, Shape(6, 64, 384), torch.device("cpu"), tokens=3)()
    first = result[0] if isinstance(result, tuple) else result
    assert isinstance(first, torch.Tensor)
    assert first.numel() == 6 * 384


def test_a_smoothed_output_is_another_one() -> None:
    for form in ("quant", "gelu_quant"):
        cases = []
        for smoothed in (False, True):
            torch.manual_seed(0)
            work = linear_case("int8_linear", form, Shape(6, 64, 384), torch.device("cpu"), smoothed=smoothed)
            cases.append(work()[0])  # type: ignore[index]
        assert not cases[0].equal(cases[1])


def test_the_layers_of_a_block() -> None:
    shapes = {name: str(shape) for name, (_, shape) in block_layers(256, 197, 1024, 4096).items()}
    assert shapes == {
        "qkv": "50432x1024x3072", "proj": "50432x1024x1024", "fc1": "50432x1024x4096", "fc2": "50432x4096x1024",
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        kernels.main([])
