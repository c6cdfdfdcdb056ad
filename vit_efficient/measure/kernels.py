"""Kernels against the library's, with the floor that the chip sets beside each.

    python -m vit_efficient.benchmark kernels --batch 256 1 --op int8_linear fp8_linear_fast --output kernels.json
    python -m vit_efficient.benchmark kernels --op int4_linear --batch 1              4-bit weights
    python -m vit_efficient.benchmark kernels --shapes qattn --output products.json   QAttn's figure 1

Each line is one operation at one shape: its median time with a cold cache, all variants of a shape in turn, and two
floors: the larger of operations over the matrix rate and bytes over the memory's, by the datasheet and by what this run
measured. Bytes count each operand once and each result once. Lines are printed and written as they come in; a shape
that does not fit the memory is left out, and said so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vit_efficient.cli import Parser, above_zero, run_command
from vit_efficient.errors import UserError
from vit_efficient.kernels.cases import INT4_GROUP, OPS, block_layers, check_heads, codes, linear_case
from vit_efficient.kernels.layernorm_quant import op as norms
from vit_efficient.kernels.quantize import op as quantization
from vit_efficient.kernels.timing import time_in_turn
from vit_efficient.kernels.tuning import Shape
from vit_efficient.machine import detect
from vit_efficient.measure import qattn
from vit_efficient.measure.figures import Figures
from vit_efficient.measure.record import environment
from vit_efficient.measure.roofline import HEAD, Kind, Line, Rates, datasheet, render

LARGEST = 8192  # side of the matrices whose product measures the matrix rate
LIBRARY: dict[Kind, str] = {
    "int8": "torch._int_mm", "fp8": "torch._scaled_mm fast", "half": "torch linear bf16", "fp32": "torch linear fp32",
}  # fmt: skip
Group = Callable[[], list[Line]]


def library_case(kind: Kind, shape: Shape, device: torch.device) -> Callable[[], Tensor]:
    """The library's product alone: int32 without scales (`_int_mm`); bfloat16, one scale in all (`_scaled_mm`); or of
    floating-point numbers."""
    if kind in ("half", "fp32"):
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        x, w = (torch.randn(rows, shape.inputs, device=device, dtype=dtype) for rows in (shape.rows, shape.outputs))
        return lambda: torch.nn.functional.linear(x, w)
    q, weight = (codes(rows, shape.inputs, kind, device) for rows in (shape.rows, shape.outputs))
    if kind == "int8":
        return lambda: torch._int_mm(q, weight.t())
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(q, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def kind_of(op: str, form: str) -> Kind:
    """What an operator multiplies: `int4_linear` unpacks its weight into what the activations are in."""
    if op == "int4_linear":
        return "int8" if form == "token" else "half"
    return "fp8" if op.startswith("fp8") else "int8"


def bytes_moved(op: str, form: str, shape: Shape) -> float:
    """Of one linear layer: what goes in, weight, and what goes out; scales and bias are left out, except of groups."""
    rows, inputs, outputs = shape.rows, shape.inputs, shape.outputs
    if op == "int4_linear":
        return 2 * rows * inputs + outputs * (inputs / 2 + 3 * -(-inputs // INT4_GROUP)) + 2 * rows * outputs
    out = 1 if form.endswith("quant") else 2
    read_again = 2 if form == "residual" else 0
    return rows * inputs + outputs * inputs + (out + read_again) * rows * outputs


def measured_rates(device: torch.device) -> dict[str, Rates]:
    """This chip's, by a large product of the library and a large copy, for each kind of number."""
    source = torch.empty(2**31, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    side = Shape(LARGEST, LARGEST, LARGEST)
    variants: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
    kinds = [kind for kind in LIBRARY if kind != "fp8" or fp8]
    variants |= {kind: library_case(kind, side, device) for kind in kinds}
    found = time_in_turn(variants, device, repetitions=10)
    moved = 2 * source.numel() / found["copy"].median * 1e3
    return {kind: Rates(2 * LARGEST**3 / found[kind].median * 1e3, moved) for kind in kinds}


def linear_lines(
    layer: str, ops: Sequence[str], batch: int, tokens: int, width: int, hidden: int, repetitions: int,
    device: torch.device,
) -> list[Line]:  # fmt: skip
    """A layer of a block: each operator plain and in the forms that models call, and the library's products."""
    variants: dict[str, tuple[Kind, float, Callable[[], object]]] = {}
    for op in ops:
        forms, shape = block_layers(op, batch, tokens, width, hidden)[layer]
        for form in dict.fromkeys(("plain", *forms, *(("token",) if op == "int4_linear" else ()))):
            about = kind_of(op, form), bytes_moved(op, form, shape)
            variants[f"{op} {form}"] = *about, linear_case(op, form, shape, device, tokens=tokens)
            if form == "gelu_quant":
                smoothed = linear_case(op, form, shape, device, tokens=tokens, smoothed=True)
                variants[f"{op} {form} smoothed"] = *about, smoothed
    for kind in dict.fromkeys(kind_of(op, "plain") for op in ops):
        if kind != "int8" or shape.rows > 16:  # `_int_mm` takes no fewer
            element = 2 if kind == "half" else 1
            moved = element * (shape.rows + shape.outputs) * shape.inputs + 2.0 * shape.rows * shape.outputs
            variants[LIBRARY[kind]] = kind, moved, library_case(kind, shape, device)
    found = time_in_turn({name: work for name, (*_, work) in variants.items()}, device, repetitions=repetitions)
    operations = 2.0 * shape.rows * shape.inputs * shape.outputs
    return [Line(layer, name, str(shape), *variants[name][:1], operations, variants[name][1], time)
            for name, time in found.items()]  # fmt: skip


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
    return [Line("rows", name, shape, "int8", 0.0, variants[name][0] * count, time) for name, time in found.items()]


def qattn_lines(layer: str, shape: Shape, repetitions: int, device: torch.device) -> list[Line]:
    """One product of `qattn`, its variants in turn."""
    variants = qattn.variants(shape, device)
    found = time_in_turn({name: work for name, (*_, work) in variants.items()}, device, repetitions=repetitions)
    operations = 2.0 * shape.rows * shape.inputs * shape.outputs
    sizes = shape.rows * shape.inputs, shape.outputs * shape.inputs, shape.rows * shape.outputs
    moved = {name: float(sum(map(int.__mul__, each, sizes))) for name, (_, each, _) in variants.items()}
    return [Line(layer, name, str(shape), variants[name][0], operations, moved[name], time)
            for name, time in found.items()]  # fmt: skip


def groups(options: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Group]]:
    """What was asked for, in parts: the name of each, and what measures it."""
    if options.shapes == "qattn":
        for model, layer, batch, shape in qattn.shapes():
            yield f"{model} {layer}, {batch} images", partial(qattn_lines, layer, shape, options.repetitions, device)
        return
    for batch in options.batch:
        sizes = batch, options.tokens, options.width, options.hidden
        for layer in block_layers(options.op[0], *sizes):
            work = partial(linear_lines, layer, options.op, *sizes, options.repetitions, device)
            yield f"{layer}, {batch} images", work
        yield f"rows, {batch} images", partial(row_lines, *sizes[:3], options.repetitions, device)


def check(options: argparse.Namespace) -> None:
    """Refuse sizes that a form cannot have.

    Raises:
        UserError: a width that is not whole heads.
    """
    if options.shapes == "block":
        for op in options.op:
            for layer in block_layers(op, 1, options.tokens, options.width, options.hidden).values():
                for form in layer.forms:
                    check_heads(form, layer.shape)


def parser() -> Parser:
    """The command line."""
    words = Parser(
        prog="python -m vit_efficient.benchmark kernels",
        description="Time the kernels against the library's, with the chip's floor beside each.",
        allow_abbrev=False,
    )
    words.add_argument(
        "--shapes", choices=["block", "qattn"], default="block", help="the layers of a block as the words below say "
        "(default), or the products of QAttn's figure 1, which need no other word",
    )  # fmt: skip
    words.add_argument("--op", nargs="+", choices=OPS, default=["int8_linear"], help="operators (default int8_linear)")
    words.add_argument("--batch", nargs="+", type=above_zero, default=[256], help="images (default 256)")
    words.add_argument("--tokens", type=above_zero, default=197, help="of an image (default 197)")
    words.add_argument("--width", type=above_zero, default=1024, help="of the model (default 1024)")
    words.add_argument("--hidden", type=above_zero, default=4096, help="of its MLP (default 4096)")
    words.add_argument("--repetitions", type=above_zero, default=30, help="of each (default 30)")
    words.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures to this file, as they come")
    return words


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: measure, print, and keep the figures as plain values."""
    options = parser().parse_args(arguments)
    check(options)
    if not torch.cuda.is_available():
        raise UserError("kernels are timed on a GPU, and there is no CUDA device here.")
    device = torch.device("cuda", torch.cuda.current_device())
    sheet, measured = datasheet(torch.cuda.get_device_name(device)), measured_rates(device)
    head = {
        "environment": environment(detect()),
        "rates_datasheet": None if sheet is None else {kind: asdict(rates) for kind, rates in sheet.items()},
        "rates_measured": {kind: asdict(rates) for kind, rates in measured.items()},
    }
    figures = Figures(options.output, head, ("lines", "left_out"))
    print(HEAD)
    for name, work in groups(options, device):
        measure_group(name, work, figures, lambda line: render(line, sheet, measured))
        torch.cuda.empty_cache()


def measure_group(name: str, work: Group, figures: Figures, text: Callable[[Line], str]) -> None:
    """Measure some lines, print them, and keep them; or say that they do not fit."""
    try:
        lines = work()
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {str(error).splitlines()[0]}"
        figures.add("left_out", {"what": name, "reason": reason})
        print(f"left out: {name}: {reason}", flush=True)
        return
    figures.add("lines", *({**asdict(line), "group": name} for line in lines))
    print("\n".join(text(line) for line in lines), flush=True)


if __name__ == "__main__":
    run_command(main)
