"""Measure, in one run, what is compared.

python -m vit_efficient.benchmark data SHARDS     decoding per core, the loader over workers, the plan at 10^9 samples
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vit_efficient.cli import Parser, run_command
from vit_efficient.errors import UserError

EXAMPLES = """\
examples:
  benchmark data data/in1k
  benchmark data data/in1k --workers 1 2 4 8 16 --interpolation bicubic --output data.json
  benchmark data                                     (the sample plan alone)
"""


def parser() -> Parser:
    """The command line of `benchmark`."""
    words = Parser(
        prog="python -m vit_efficient.benchmark",
        description="Measure the data pipeline: per core, over workers, and the sample plan at 10^9 samples.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words.add_argument("what", choices=["data"], help="what to measure")
    words.add_argument("shards", nargs="?", metavar="SHARDS", help="as `data.shards`; images to decode and load")
    words.add_argument("--images", type=_positive, default=500, metavar="N", help="how many are decoded (default 500)")
    words.add_argument("--size", type=_positive, default=224, help="pixels a side of the result (default 224)")
    words.add_argument("--interpolation", choices=["bilinear", "bicubic"], default="bilinear")
    words.add_argument("--repetitions", type=_positive, default=5, metavar="N", help="of all pipelines (default 5)")
    words.add_argument("--workers", type=_positive, nargs="+", metavar="N", help="loader processes to try")
    words.add_argument("--batch-size", type=_positive, default=256, metavar="N", help="of the loader (default 256)")
    words.add_argument("--seconds", type=float, default=5.0, metavar="S", help="each loader is timed for (default 5)")
    words.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures to this file")
    return words


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def benchmark(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    from vit_efficient.engine.rundir import write_json
    from vit_efficient.engine.trainer import quiet
    from vit_efficient.machine import detect
    from vit_efficient.measure.data import measure_data, print_data
    from vit_efficient.measure.record import environment

    quiet()
    if options.seconds <= 0:
        raise UserError(f"--seconds {options.seconds:g} is not above 0")
    machine = detect()
    cores = machine.cores or os.cpu_count() or 1
    workers = options.workers or [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= cores]
    figures = measure_data(
        options.shards,
        size=options.size,
        mode=options.interpolation,
        images=options.images,
        repetitions=options.repetitions,
        workers=workers,
        batch_size=options.batch_size,
        seconds=options.seconds,
        progress=lambda text: console.print(f"[dim]{text}[/]", soft_wrap=True),
    )
    figures["environment"] = environment(machine)
    print_data(console, figures)
    if options.output is not None:
        write_json(options.output, figures)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can mend."""
    benchmark(parser().parse_args(argv), Console(highlight=False))


if __name__ == "__main__":
    run_command(main)
