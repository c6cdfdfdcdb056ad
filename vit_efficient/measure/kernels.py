"""Kernels against the library's, with the floor that the chip sets beside each.

    python -m vit_efficient.benchmark kernels --batch 256 1 --op int8_linear fp8_linear_fast --output kernels.json

Each line is one operation at one shape: its median time with a cold cache, all variants of a shape in turn, and two
floors: the larger of operations over the matrix rate and bytes over the memory's, by the datasheet and by what this run
measured. Bytes count each operand once and each result once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_efficient.cli import Parser, run_command
from vit_efficient.errors import UserError
from vit_efficient.kernels.cases import OPS, block_layers, codes, linear_case
from vit_efficient.kernels.layernorm_quant import op as norms
from vit_efficient.kernels.quantize import op as quantization
from vit_efficient.kernels.timing import Timed, time_in_turn
from vit_efficient.kernels.tuning import Shape
from vit_efficient.machine import detect
from vit_efficient.measure.record import environment

# Dense rates of the datasheets: operations a second of 8-bit matrix units, bytes a second of memory.
DATASHEET = {
    "NVIDIA H200": (1979e12, 4.8e12), "NVIDIA H100 80GB HBM3": (1979e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (624e12, 2.039e12), "NVIDIA GeForce RTX 4090": (660.6e12, 1.008e12),
}  # fmt: skip
LARGEST = 8192  # side of the matrices whose product measures the matrix rate


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second."""

    operations: float
    bytes: float

    def floor(self, operations: float, moved: float) -> float:
        """Milliseconds that nothing can be faster than."""
        return 1e3 * max(operations / self.operations, moved / self.bytes)


@dataclass(frozen=True)
class Line:
    """One operation at one shape."""

    what: str
    variant: str
    shape: str
    operations: float
    bytes: float
    time: Timed


def library_case(kind: str, shape: Shape, device: torch.device) -> Callable[[], Tensor]:
    """The library's product alone: int32 without scales (`_int_mm`); bfloat16, one scale in all (`_scaled_mm`)."""
    q, weight = (codes(rows, shape.inputs, kind, device) for rows in (shape.rows, shape.outputs))
    if kind == "int8":
        return lambda: torch._int_mm(q, weight.t())
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(q, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def bytes_moved(form: str, shape: Shape) -> float:
    """Of one linear layer: codes in, weight, and what goes out; scales and bias are left out."""
    out = 1 if form.endswith("quant") else 2
    read_again = 2 if form == "residual" else 0
    return shape.rows * shape.inputs + shape.outputs * shape.inputs + (out + read_again) * shape.rows * shape.outputs


def measured_rates(device: torch.device) -> dict[str, Rates]:
    """This chip's, by a large product of the library and a large copy, for each number format."""
    source = torch.empty(2**31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = Shape(LARGEST, LARGEST, LARGEST)
    variants: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    kinds = ["int8"] + ["fp8"] * (torch.cuda.get_device_capability(device) >= (8, 9))
    variants |= {kind: library_case(kind, side, device) for kind in kinds}
    found = time_in_turn(variants, device, repetitions=10)
    moved = 2 * source.numel() / found["copy"].median * 1e3
    return {kind: Rates(2 * LARGEST**3 / found[kind].median * 1e3, moved) for kind in kinds}


def linear_lines(ops: Sequence[str], batch: int, tokens: int, width: int, hidden: int, repetitions: int,
                 device: torch.device) -> list[Line]:  # fmt: skip
    """The four layers of a block: each operator plain and in its fused form, and the library's products."""
    lines = []
    kinds = dict.fromkeys(op.partition("_")[0] for op in ops)
    for layer, (form, shape) in block_layers(batch, tokens, width, hidden).items():
        variants: dict[str, tuple[str, Callable[[], object]]] = {}
        for op in ops:
            for each in ("plain", form):
                variants[f"{op} {each}"] = each, linear_case(op, each, shape, device, tokens=tokens)
            if form == "gelu_quant":
                smoothed = linear_case(op, form, shape, device, tokens=tokens, smoothed=True)
                variants[f"{op} {form} smoothed"] = form, smoothed
        for kind in kinds:
            name = {"int8": "torch._int_mm", "fp8": "torch._scaled_mm fast"}[kind]
            if kind != "int8" or shape.rows > 16:
                variants[name] = "plain", library_case(kind, shape, device)
        found = time_in_turn({name: work for name, (_, work) in variants.items()}, device, repetitions=repetitions)
        operations = 2.0 * shape.rows * shape.inputs * shape.outputs
        lines += [
            Line(layer, name, str(shape), operations, bytes_moved(variants[name][0], shape), time)
            for name, time in found.items()
        ]
    return lines


def row_lines(batch: int, tokens: int, width: int, repetitions: int, device: torch.device) -> list[Line]:
    """Norms and quantization, bfloat16 in, beside PyTorch's own norm and its addition."""
    rows, bf16 = batch * tokens, torch.bfloat16
    x, residual = (torch.randn(rows, width, device=device, dtype=bf16) for _ in range(2))
    weight, bias = (torch.randn(width, device=device, dtype=bf16) for _ in range(2))
    affine = (weight, bias, 1e-6)
    count = rows * width

    def library() -> tuple[Tensor, Tensor]:
        new = residual + x
        return torch.nn.functional.layer_norm(new, (width,), *affine), new

    variants: dict[str, tuple[int, Callable[[], object]]] = {
        "quantize int8": (3, lambda: quantization.quantize(x)),
        "layernorm_quant int8": (3, lambda: norms.layernorm_quant(x, *affine)),
        "add_layernorm_quant int8": (7, lambda: norms.add_layernorm_quant(x, residual, None, *affine)),
        "add_layernorm": (8, lambda: norms.add_layernorm(x, residual, None, *affine)),
        "torch add, layer_norm": (8, library),
    }
    found = time_in_turn({name: work for name, (_, work) in variants.items()}, device, repetitions=repetitions)
    shape = f"{rows}x{width}"
    return [Line("rows", name, shape, 0.0, variants[name][0] * count, time) for name, time in found.items()]


def render(lines: Sequence[Line], sheet: Rates | None, measured: dict[str, Rates]) -> str:
    """A table as text."""
    head = f"{'what':5} {'variant':34} {'shape':18} {'ms':>9} {'spread':>8} {'T/s':>7} {'TB/s':>6} " \
           f"{'floor':>8} {'by sheet':>8} {'of floor':>8}"  # fmt: skip
    text = [head]
    for line in lines:
        kind = "fp8" if "fp8" in line.variant or "scaled" in line.variant else "int8"
        rates = measured.get(kind, measured["int8"])
        floor = rates.floor(line.operations, line.bytes)
        by_sheet = f"{sheet.floor(line.operations, line.bytes):8.4f}" if sheet else f"{'':8}"
        time = line.time
        text.append(
            f"{line.what:5} {line.variant:34} {line.shape:18} {time.median:9.4f} {time.high - time.low:8.4f} "
            f"{line.operations / time.median / 1e9:7.1f} {line.bytes / time.median / 1e9:6.2f} {floor:8.4f} "
            f"{by_sheet} {100 * floor / time.median:7.1f}%"
        )
    return "\n".join(text)


def measure_kernels(
    ops: Sequence[str], batches: Sequence[int], tokens: int, width: int, hidden: int, repetitions: int
) -> tuple[list[Line], Rates | None, dict[str, Rates]]:
    """All lines, the datasheet's rates (None of a chip that is not listed), and those measured in this run."""
    if not torch.cuda.is_available():
        raise UserError("kernels are timed on a GPU, and there is no CUDA device here.")
    device = torch.device("cuda", torch.cuda.current_device())
    sheet = DATASHEET.get(torch.cuda.get_device_name(device))
    measured = measured_rates(device)
    lines = []
    for batch in batches:
        lines += linear_lines(ops, batch, tokens, width, hidden, repetitions, device)
        lines += row_lines(batch, tokens, width, repetitions, device)
    return lines, Rates(*sheet) if sheet else None, measured


def parser() -> Parser:
    """The command line."""
    words = Parser(
        prog="python -m vit_efficient.benchmark kernels",
        description="Time the kernels against the library's, with the chip's floor beside each.",
        allow_abbrev=False,
    )
    words.add_argument("--op", nargs="+", choices=OPS, default=["int8_linear"], help="operators (default int8_linear)")
    words.add_argument("--batch", nargs="+", type=int, default=[256], help="images (default 256)")
    words.add_argument("--tokens", type=int, default=197, help="of an image (default 197)")
    words.add_argument("--width", type=int, default=1024, help="of the model (default 1024)")
    words.add_argument("--hidden", type=int, default=4096, help="of its MLP (default 4096)")
    words.add_argument("--repetitions", type=int, default=30, help="of each (default 30)")
    words.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures to this file")
    return words


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and give the figures as plain values."""
    lines, sheet, measured = measure_kernels(
        options.op, options.batch, options.tokens, options.width, options.hidden, options.repetitions
    )
    print(render(lines, sheet, measured))
    return {
        "environment": environment(detect()),
        "rates_datasheet": asdict(sheet) if sheet else None,
        "rates_measured": {kind: asdict(rates) for kind, rates in measured.items()},
        "lines": [asdict(line) for line in lines],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser().parse_args(arguments)
    found = run(options)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_command(main)
