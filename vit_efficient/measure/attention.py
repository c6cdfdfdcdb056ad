"""Attention kernels against every other backend, with the floor that the chip sets beside each.

    python -m vit_efficient.benchmark attention --output attention.json             ViT shapes, short to long
    python -m vit_efficient.benchmark attention --shapes qattn --heads 12 16        QAttn's figure 2
    python -m vit_efficient.benchmark attention --shapes 1370x64 --tune             choose tiles here, then measure

Each line is one backend at one shape, queries, keys and values being views of one packed projection in bf16: its median
time with a cold cache, all backends of a shape in turn, what it does in TFLOP/s (4 B H N^2 E, whatever number format it
multiplies in, as QAttn counts), and how far its output is from float64. Times of int8 and fp8 attention have
quantization in them, except the line that says ``codes given``.

Lines are printed and written as they come in. What a machine refuses, and what does not fit its memory, is left out and
listed with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vit_efficient.attention import reference
from vit_efficient.cli import Parser, above_zero, run_command
from vit_efficient.errors import UserError
from vit_efficient.kernels.capability import lacks_triton
from vit_efficient.kernels.timing import Timed, time_in_turn
from vit_efficient.kernels.tuning import chip_of
from vit_efficient.machine import Machine, detect
from vit_efficient.measure.attention_cases import SWITCHED, Case, Work, cases, operands, others, ours, refusals
from vit_efficient.measure.attention_tiles import tune_case
from vit_efficient.measure.figures import Figures
from vit_efficient.measure.record import environment
from vit_efficient.measure.trouble import EXPECTED, said, works


@dataclass(frozen=True)
class Line:
    """One backend at one shape; `error` relative to float64, of the first image."""

    case: Case
    backend: str
    time: Timed
    tflops: float
    error: float
    floors: dict[str, float]


@dataclass(frozen=True)
class LeftOut:
    """A backend that did not run at a shape, and why; None where all of them, or all shapes, are meant."""

    case: Case | None
    backend: str | None
    reason: str


def errors_of(runs: dict[str, Work], exact: Tensor, device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Run each once: relative errors of the first image, and reasons of those that cannot.

    Args:
        runs: by the backend's name.
        exact: (1, H, N, E) float64.
        device: that must go on working.
    """
    errors, failed = {}, {}
    for name, work in runs.items():
        try:
            y = work()[:1].double() * (0.03 if name.endswith("codes out") else 1.0)
            errors[name] = float((y - exact).norm() / exact.norm())
        except EXPECTED as error:
            if not works(device):
                raise
            failed[name] = said(error)
    return errors, failed


def in_turns(names: Sequence[str]) -> list[list[str]]:
    """Who is timed in turn with whom: each backend behind PyTorch's switch alone, after the others."""
    alone = [name for name in names if name in SWITCHED]
    return [turn for turn in ([name for name in names if name not in alone], *([name] for name in alone)) if turn]


def measure_case(
    case: Case, machine: Machine, device: torch.device, repetitions: int
) -> tuple[list[Line], list[LeftOut]]:
    """All backends at one shape, in turn; and those that could not run there."""
    q, k, v = operands(case, device)
    scale, chip = case.width**-0.5, chip_of(device)[0]
    runs = others(machine, q, k, v, scale) | ours(q, k, v, scale)
    exact = reference.attend(*(x[:1].double() for x in (q, k, v)), scale=scale)
    errors, failed = errors_of(runs, exact, device)
    del exact
    found: dict[str, Timed] = {}
    for turn in in_turns(list(errors)):
        found |= time_in_turn({name: runs[name] for name in turn}, device, repetitions=repetitions)
    lines = [
        Line(case, name, time, case.operations / time.median / 1e9, errors[name], case.floors(name, chip))
        for name, time in found.items()
    ]
    return lines, [LeftOut(case, name, reason) for name, reason in failed.items()]


HEAD = f"{'shape':28} {'backend':28} {'ms':>9} {'spread':>8} {'TFLOP/s':>8} {'speed':>6} {'error':>8}  floor"


def render(lines: Sequence[Line]) -> str:
    """Rows under `HEAD` of one shape's lines, the best of the others being 1."""
    best = min((line.time.median for line in lines if not line.backend.startswith(("int8", "fp8"))), default=None)
    text = []
    for line in lines:
        share = ""
        if line.floors:
            limit, floor = max((floor, name) for name, floor in line.floors.items())
            share = f"{limit:.4f} {floor}, {100 * limit / line.time.median:.0f} %"
        speed = f"{best / line.time.median:6.2f}" if best is not None else f"{'':6}"
        text.append(
            f"{line.case!s:28} {line.backend:28} {line.time.median:9.4f} {line.time.high - line.time.low:8.4f} "
            f"{line.tflops:8.1f} {speed} {line.error:8.1e}  {share}"
        )
    return "\n".join(text)


def parser() -> Parser:
    """The command line."""
    words = Parser(
        prog="python -m vit_efficient.benchmark attention",
        description="Time attention kernels against the other backends, quantization included.",
        allow_abbrev=False,
    )
    words.add_argument(
        "--shapes", nargs="+", default=["vit"], metavar="SET|NxB", help="vit (default), qattn, or tokens x images"
    )
    words.add_argument("--heads", nargs="+", type=above_zero, default=[16], help="of the attention (default 16)")
    words.add_argument("--width", type=above_zero, default=64, help="of a head (default 64)")
    words.add_argument("--repetitions", type=above_zero, default=30, help="of each (default 30)")
    words.add_argument("--tune", action="store_true", help="measure tiles first, and keep the best on this machine")
    words.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures to this file, as they come")
    return words


def leave_out(figures: Figures, found: LeftOut) -> None:
    """Keep and say that something was not measured."""
    figures.add("left_out", asdict(found))
    where = "" if found.case is None else f"{found.case} "
    print(f"left out: {where}{found.backend or 'all backends'}: {found.reason}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options: argparse.Namespace = parser().parse_args(arguments)
    wanted = cases(options.shapes, options.heads, options.width)
    if not torch.cuda.is_available():
        raise UserError("Attention kernels are timed on a GPU, and there is no CUDA device here.")
    device = torch.device("cuda", torch.cuda.current_device())
    if (why := lacks_triton(device)) is not None:
        raise UserError(f"Attention kernels were to be timed, but {why}")
    machine = detect()
    figures = Figures(options.output, {"environment": environment(machine)}, ("lines", "left_out"))
    for name, reason in refusals(machine, options.width).items():
        leave_out(figures, LeftOut(None, name, reason))
    print(HEAD)
    for case in wanted:
        try:
            if options.tune:
                tune_case(case, device)
            lines, failed = measure_case(case, machine, device, options.repetitions)
        except torch.OutOfMemoryError as error:
            failed, lines = [LeftOut(case, None, said(error))], []
        figures.add("lines", *(asdict(line) for line in lines))
        for one in failed:
            leave_out(figures, one)
        if lines:
            print(render(lines), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_command(main)
