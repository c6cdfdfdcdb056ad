"""How kernels are launched, seen without a GPU: on the device of their operands, and on grids that CUDA takes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels import attention_launch
from vit_efficient.kernels.fp8_attention import triton as fp8_attention
from vit_efficient.kernels.int4_linear import triton as int4_linear
from vit_efficient.kernels.int8_attention import triton as int8_attention
from vit_efficient.kernels.layernorm_quant import triton as layernorm_quant
from vit_efficient.kernels.linear import launch as linear
from vit_efficient.kernels.linear.triton import linear_kernel
from vit_efficient.kernels.quantize import triton as quantize

MOST_ALONG_Y = 65_535  # programs, and along z; along x 2**31 - 1


class Launches:
    """What stands for kernels does with a launch: it notes the grid, and whether the operands' device is current."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []
        self.on: list[Tensor] = []
        self.arguments: tuple[Any, ...] = ()

    @contextlib.contextmanager
    def device_of(self, x: Tensor) -> Iterator[None]:
        self.on.append(x)
        yield
        self.on.pop()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            assert self.on, "launched on whichever device is current"
            self.grids.append(grid)
            self.arguments = arguments

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(torch.cuda, "device_of", made.device_of)
    for module, names in (
        (attention_launch, ("attend_kernel", "operands_kernel")),
        (int4_linear, ("int4_kernel", "add_parts_kernel")),
        (layernorm_quant, ("_kernel",)),
        (linear, ("linear_kernel",)),
        (quantize, ("_kernel", "_dequantize_kernel")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, made)
    return made


def attend(pairs: int, form: str) -> None:
    q, k, v = (torch.zeros(1, 1, 3, 16).expand(pairs, -1, -1, -1) for _ in range(3))
    if form == "int8":
        int8_attention.attend(q, k, v, None, None, None, 0.25, "int8", "token", None, torch.float32)
    else:
        fp8_attention.attend(q, k, v, 0.25, True, "fp8", None, torch.float32)


def multiply(form: str) -> None:
    dtype = torch.int8 if form == "int8" else torch.float8_e4m3fn
    codes, scales = torch.zeros(5, 64).to(dtype), torch.ones(5, 1)
    linear.launch(codes, scales, codes, scales, None, linear.Form(), False, torch.empty(5, 5), descriptors=False)


def multiply_packed(activations: str) -> None:
    packed, scale = torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 8)
    int4_linear.int4_linear(torch.zeros(2, 256), packed, scale, None, None, 32, activations, torch.float32)


LAUNCHES: dict[str, tuple[Callable[[], Any], int]] = {  # and how many there are
    "int8 attention": (partial(attend, 1, "int8"), 2),
    "fp8 attention": (partial(attend, 1, "fp8"), 2),
    "linear int8": (partial(multiply, "int8"), 1),
    "linear fp8": (partial(multiply, "fp8"), 1),
    "int4": (partial(multiply_packed, "none"), 2),
    "int4 quantized": (partial(multiply_packed, "token"), 3),
    "layernorm": (lambda: layernorm_quant.layernorm_quant(torch.zeros(2, 32), None, None, 1e-6, "int8", None), 1),
    "dequantize": (lambda: quantize.dequantize(torch.zeros(2, 32), torch.ones(2, 1), torch.float32), 1),
    "quantize": (lambda: quantize.quantize(torch.zeros(2, 32), "int8", None), 1),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_run_where_their_operands_are(name: str, launches: Launches) -> None:
    launch, count = LAUNCHES[name]
    launch()
    assert len(launches.grids) == count


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_heads_and_images_are_as_many_as_they_are(form: str, launches: Launches) -> None:
    attend(70_000, form)
    assert len(launches.grids) == 2
    for first, *others in launches.grids:
        assert first >= 70_000
        assert all(other <= MOST_ALONG_Y for other in others)


@pytest.mark.parametrize(
    ("overlapped", "rows", "inputs", "stride", "first", "early"),
    [
        (True, 5, 64, 64, 0, True),
        (False, 5, 64, 64, 0, False),  # the interpreter, which knows no PTX, and GPUs before sm_90
        (True, 5000, 64, 64, 0, False),  # several tiles a program
        (True, 5, 63, 64, 0, False),
        (True, 5, 64, 65, 0, False),
        (True, 5, 64, 80, 0, False),
        (True, 5, 64, 64, 1, False),
    ],
)
def test_weights_are_asked_for_ahead_where_they_can_be(
    overlapped: bool, rows: int, inputs: int, stride: int, first: int, early: bool, launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if overlapped:
        monkeypatch.setattr(linear, "overlap", lambda device: {"OVERLAP": True, "launch_pdl": True})
    x, memory = torch.zeros(rows, inputs, dtype=torch.int8), torch.zeros(16 * stride + first, dtype=torch.int8)
    weights = memory[first:].view(16, stride)[:, :inputs]
    scales = torch.ones(16, 1)
    linear.launch(x, torch.ones(rows, 1), weights, scales, None, linear.Form(), False, torch.empty(rows, 16))
    given = launches.arguments[linear_kernel.arg_names.index("weights")]
    assert (given is not None) == early
    assert given is None or given.data_ptr() == weights.data_ptr()
