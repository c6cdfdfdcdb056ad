"""Measure tiles for this GPU, once, on request, and keep the best for every later run of this user.

    python -m vit_efficient.kernels.tune --op int8_linear --batch 256               the four layers of a ViT-L block
    python -m vit_efficient.kernels.tune --op int4_linear --batch 1                 those with 4-bit weights
    python -m vit_efficient.kernels.tune --op fp8_linear_fast --forms plain --shapes 50432x1024x4096 197x1024x4096
    python -m vit_efficient.kernels.tune --op int8_linear --batch 1 --output tiles_h200.json     entries for tiles.json

Candidates are compiled by several processes first, then timed in turn with a cold cache. Each takes some seconds to
compile, once: Triton keeps what it compiled.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vit_efficient.cli import Parser, above_zero, run_command
from vit_efficient.errors import UserError
from vit_efficient.kernels.capability import lacks_triton
from vit_efficient.kernels.cases import (
    FORMS,
    INT4_FORMS,
    OPS,
    block_layers,
    check_heads,
    forms_of,
    linear_case,
    tile_name,
)
from vit_efficient.kernels.timing import time_in_turn
from vit_efficient.kernels.tuning import Shape, Tile, chip_of, choose, forced, keep

# For many rows, then for few. What does not fit a GPU's registers or shared memory is left out when it is tried.
LARGE = (
    Tile(128, 256, 128, 8, 8, 3, parts=1), Tile(128, 256, 128, 8, 8, 3, parts=2), Tile(128, 256, 128, 8, 8, 3, parts=4),
    Tile(256, 128, 128, 8, 8, 3, parts=2), Tile(128, 128, 128, 8, 8, 4, parts=1), Tile(128, 128, 128, 8, 4, 3, 1, 2),
    Tile(128, 128, 128, 8, 4, 3, 2, 2), Tile(128, 128, 128, 8, 4, 3, 4, 2), Tile(128, 128, 64, 8, 4, 4, 1, 2),
    Tile(128, 128, 64, 8, 4, 4, 2, 2), Tile(128, 128, 128, 8, 8, 3, 2, 2, 128), Tile(128, 128, 128, 8, 8, 3, 4, 2, 128),
    Tile(128, 128, 64, 8, 8, 4, 2, 2, 128),
)  # fmt: skip
SMALL = (
    Tile(64, 32, 256, 1, 4, 4, programs=2), Tile(64, 32, 128, 2, 4, 6, programs=2), Tile(64, 64, 128, 4, 4, 4, 1, 2),
    Tile(64, 64, 256, 4, 4, 3, programs=2), Tile(64, 128, 128, 4, 4, 4), Tile(128, 64, 128, 2, 4, 4),
    Tile(128, 64, 128, 2, 8, 5), Tile(64, 16, 256, 1, 4, 5, programs=2), Tile(128, 128, 128, 4, 8, 4, parts=2),
)  # fmt: skip
FEW_ROWS = 1024
# Of `int4_linear`, which takes one group of inputs a step, whatever `block_k` says.
INT4_FEW = tuple(
    Tile(m, n, 64, warps=4, stages=stages) for m in (16, 32, 64) for n in (32, 64, 128) for stages in (3, 4, 6)
)
INT4_MANY = tuple(
    Tile(m, n, 64, warps=warps, stages=stages)
    for m, n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (64, 256, 8), (128, 256, 8))
    for stages in (2, 3, 4)
)


class Case(NamedTuple):
    """What is tuned: a form of an operator at a shape, and the rows of an image where it lays out heads."""

    op: str
    form: str
    shape: Shape
    tokens: int | None = None


def cases(options: argparse.Namespace) -> list[Case]:
    """What was asked for: the shapes named, in the forms named, or the layers of a block in the forms models call.

    Raises:
        UserError: a form that an operator lacks, or outputs that are not whole heads.
    """
    wanted = _cases(options)
    for case in wanted:
        check_heads(case.form, case.shape)
    return wanted


def _cases(options: argparse.Namespace) -> list[Case]:
    if not options.shapes:
        return [
            Case(op, form, layer.shape, options.tokens)
            for op in options.op
            for batch in options.batch
            for layer in block_layers(op, batch, options.tokens, options.width, options.hidden).values()
            for form in layer.forms
        ]
    for op in options.op:
        for form in options.forms:
            if form not in forms_of(op):
                raise UserError(f"--forms {form}: {op} has no such form. It has {', '.join(forms_of(op))}.")
    return [Case(op, form, shape) for op in options.op for form in options.forms for shape in options.shapes]


def candidates(op: str, shape: Shape) -> list[Tile]:
    """Tiles worth measuring at a shape."""
    few = shape.rows <= FEW_ROWS
    if op == "int4_linear":
        return list(INT4_FEW if few else INT4_MANY)
    return list(SMALL if few else LARGE)


def runs(work: Callable[[], object], tile: Tile) -> bool:
    """Whether a tile fits this GPU."""
    from triton.runtime.errors import OutOfResources

    try:
        with forced(tile):
            work()
        torch.cuda.synchronize()
    except OutOfResources:
        return False
    return True


def tune_one(case: Case, device: torch.device) -> dict[str, Any]:
    """Measure the candidates of one form at one shape, keep the best, and say what was found."""
    op, form, shape, tokens = case
    work, looked_up = linear_case(op, form, shape, device, tokens=tokens), tile_name(op, form)
    now = choose(looked_up, device, shape)
    tiles = [tile for tile in dict.fromkeys((now, *candidates(op, shape))) if runs(work, tile)]

    def with_tile(tile: Tile) -> Callable[[], object]:
        def run() -> object:
            with forced(tile):
                return work()

        return run

    timed = time_in_turn({str(index): with_tile(tile) for index, tile in enumerate(tiles)}, device)
    order = sorted(range(len(tiles)), key=lambda index: timed[str(index)].median)
    best = order[0]
    milliseconds = timed[str(best)].median
    name, _ = chip_of(device)
    keep(name, looked_up, shape, tiles[best], milliseconds, _versions())
    operations = 2 * shape.rows * shape.inputs * shape.outputs
    return {
        "op": looked_up, **asdict(shape), "tile": asdict(tiles[best]), "ms": round(milliseconds, 5),
        "tera_per_s": round(operations / milliseconds / 1e9, 1), "before_ms": round(timed["0"].median, 5),
        "all": [{"tile": asdict(tiles[i]), "ms": round(timed[str(i)].median, 5)} for i in order],
    }  # fmt: skip


def _versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def _compile(job: tuple[Case, Tile]) -> None:
    (op, form, shape, tokens), tile = job
    device = torch.device("cuda", torch.cuda.current_device())
    runs(linear_case(op, form, shape, device, tokens=tokens), tile)


def compile_all(wanted: Iterable[Case], processes: int) -> None:
    """Fill Triton's cache with all kernels that will be timed, several at a time."""
    jobs = [(case, tile) for case in wanted for tile in candidates(case.op, case.shape)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for _ in pool.imap_unordered(_compile, jobs):
            pass


def parser() -> Parser:
    """The command line."""
    words = Parser(
        prog="python -m vit_efficient.kernels.tune",
        description="Measure tiles of the matrix kernels on this GPU and keep the best.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words.add_argument("--op", nargs="+", choices=OPS, default=["int8_linear"], help="operators (default int8_linear)")
    words.add_argument(
        "--forms",
        nargs="+",
        choices=dict.fromkeys(FORMS + INT4_FORMS),
        help="what follows the product (default: as in a block)",
    )
    words.add_argument("--shapes", nargs="+", type=_shape, metavar="MxKxN", help="with --forms: rows, inputs, outputs")
    words.add_argument("--batch", nargs="+", type=above_zero, default=[256], help="images (default 256)")
    words.add_argument("--tokens", type=above_zero, default=197, help="of an image (default 197)")
    words.add_argument("--width", type=above_zero, default=1024, help="of the model (default 1024)")
    words.add_argument("--hidden", type=above_zero, default=4096, help="of its MLP (default 4096)")
    words.add_argument("--processes", type=above_zero, default=min(8, os.cpu_count() or 1), help="that compile")
    words.add_argument("--output", type=Path, metavar="FILE.json", help="write all figures to this file")
    return words


def _shape(text: str) -> Shape:
    try:
        rows, inputs, outputs = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no MxKxN, such as 50432x1024x4096") from None
    if min(rows, inputs, outputs) < 1:
        raise argparse.ArgumentTypeError(f"{text} has a number that is not above 0")
    return Shape(rows, inputs, outputs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError(
            "tune was asked to measure, and there is no CUDA device here. Run it on the GPU that will serve."
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if (why := lacks_triton(device)) is not None:
        raise UserError(f"tune was asked to measure Triton kernels, but {why}")
    if (options.shapes is None) != (options.forms is None):
        raise UserError("--shapes and --forms go together: a shape is measured in a form, for example plain.")
    wanted = cases(options)
    compile_all(wanted, options.processes)
    found = []
    for case in wanted:
        one = tune_one(case, device)
        found.append(one)
        tile = " ".join(str(value) for value in one["tile"].values())
        print(f"{one['op']:28} {case.shape!s:18} {one['ms']:9.4f} ms  {one['tera_per_s']:7.1f} T/s  "
              f"(before {one['before_ms']:.4f} ms)  tile {tile}", flush=True)  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"chip": chip_of(device), **_versions(), "tiles": found}, indent=1))


if __name__ == "__main__":
    run_command(main)
