"""Measure, in one run, what is compared.

python -m vit_efficient.benchmark --recipe fp32_sdpa --recipe int8_sdpa --batch 1,64,256 protocol=imagenet_vit_l16
python -m vit_efficient.benchmark training        training steps as `fit` does them, on one GPU or several
python -m vit_efficient.benchmark data SHARDS     decoding per core, the loader over workers, the plan at 10^9 samples
python -m vit_efficient.benchmark kernels         matrix products and norms against the library's, with their floors
python -m vit_efficient.benchmark attention       attention kernels against the other backends
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from vit_efficient.cli import Parser, above_zero, base_parser, output_file, run_command
from vit_efficient.errors import UserError

if TYPE_CHECKING:
    from vit_efficient.engine.entries import Entry
    from vit_efficient.machine import Machine
    from vit_efficient.measure.models import Row
    from vit_efficient.recipe.schema import Recipe

HOWS = ("eager", "compiled", "graph", "compiled-graph")
MODEL_EXAMPLES = """\
examples:
  benchmark --recipe fp32_sdpa --recipe int8_sdpa                   (the digits model)
  benchmark --recipe "fp32_sdpa quantization.precision=bf16" --recipe fp8_sdpa --how compiled,graph \\
            --batch 1,256 protocol=imagenet_vit_l16 --output figures.json
  benchmark --checkpoint runs/A --checkpoint model.safetensors      (trained or quantized models)
  benchmark --peers --batch 256 protocol=imagenet_vit_l16           (what else a user could take)
  benchmark --against "bf16 + compile" --recipe fp8_sdpa --how graph --batch 256 protocol=imagenet_vit_l16
  benchmark --train --recipe int8_sdpa --recipe int4_sdpa --batch 128 protocol=imagenet_vit_l16
  benchmark training --recipe "fp32_sdpa strategy=ddp" --batch 128  (as `fit` trains: benchmark training --help)
  benchmark data data/in1k                                          (the data pipeline: benchmark data --help)
  benchmark kernels --batch 1 256; benchmark attention --shapes qattn   (on a GPU; each has its own --help)

The first contender is what the others are held against. All are in memory at once and take turns.
key=value words override every recipe; those in the quotes of one --recipe override that one.
"""
DATA_EXAMPLES = """\
examples:
  benchmark data data/in1k
  benchmark data data/in1k --workers 1 2 4 8 16 --interpolation bicubic --output data.json
  benchmark data                                     (the sample plan alone)
"""


def model_parser() -> Parser:
    """The command line of the model benchmark."""
    words = base_parser(
        "benchmark",
        "Hold models against each other: latency, images a second, memory. `benchmark data`: the data pipeline.",
        several=True,
        required=False,
    )
    words.formatter_class = argparse.RawDescriptionHelpFormatter
    words.epilog = MODEL_EXAMPLES
    words.add_argument(
        "--checkpoint",
        metavar="C",
        action="append",
        default=[],
        help="a run, model file or checkpoint; may be repeated",
    )
    words.add_argument("--peers", action="store_true", help="what else a user could take, beside them")
    words.add_argument(
        "--against", metavar="PEER", help="one of the peers comes first, and the others are held against it"
    )
    words.add_argument("--train", action="store_true", help="time training steps and not inference")
    words.add_argument("--batch", type=_batches, default=(1, 64), metavar="B,B", help="images in a call (default 1,64)")
    words.add_argument(
        "--how",
        type=_hows,
        metavar="H,H",
        help=f"{', '.join(HOWS)} (default: compiled with strategy.compile, or eager)",
    )
    words.add_argument(
        "--compile-mode",
        metavar="M",
        help="of torch.compile, for all that are compiled: default, reduce-overhead, max-autotune or "
        "max-autotune-no-cudagraphs (compiled-graph takes the latter of the two)",
    )
    words.add_argument("--rounds", type=above_zero, default=5, metavar="N", help="turns of each (default 5)")
    words.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of a turn, about (default 0.5)")
    words.add_argument("--output", type=output_file, metavar="FILE.json", help="write the figures to this file")
    return words


def data_parser() -> Parser:
    """The command line of `benchmark data`."""
    words = Parser(
        prog="python -m vit_efficient.benchmark data",
        description="Measure the data pipeline: per core, over workers, and the sample plan at 10^9 samples.",
        epilog=DATA_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    words.add_argument("shards", nargs="?", metavar="SHARDS", help="as `data.shards`; images to decode and load")
    words.add_argument("--images", type=above_zero, default=500, metavar="N", help="how many are decoded (default 500)")
    words.add_argument("--size", type=above_zero, default=224, help="pixels a side of the result (default 224)")
    words.add_argument("--interpolation", choices=["bilinear", "bicubic"], default="bilinear")
    words.add_argument("--repetitions", type=above_zero, default=5, metavar="N", help="of all pipelines (default 5)")
    words.add_argument("--workers", type=above_zero, nargs="+", metavar="N", help="loader processes to try")
    words.add_argument("--batch-size", type=above_zero, default=256, metavar="N", help="of the loader (default 256)")
    words.add_argument("--seconds", type=float, default=5.0, metavar="S", help="each loader is timed for (default 5)")
    words.add_argument("--output", type=output_file, metavar="FILE.json", help="write the figures to this file")
    return words


def _batches(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(above_zero(part) for part in text.split(",")))


def _hows(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(text.split(",")))
    for part in parts:
        if part not in HOWS:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(HOWS)}")
    return parts


def benchmark_models(options: argparse.Namespace, console: Console) -> None:
    """Run the model benchmark."""
    from dataclasses import replace

    from vit_efficient.attention.choice import choices
    from vit_efficient.engine.contenders import build_contenders, load_entry
    from vit_efficient.engine.entries import PEERS, Entry, check_mode, peer
    from vit_efficient.engine.rundir import write_json
    from vit_efficient.engine.trainer import quiet
    from vit_efficient.machine import detect
    from vit_efficient.measure.model_table import print_models
    from vit_efficient.measure.models import Contender, measure_models
    from vit_efficient.measure.record import environment

    quiet()
    _seconds(options.seconds)
    against = [peer(options.against, train=options.train)] if options.against else []
    if options.train and (options.how or options.checkpoint or options.peers):
        raise UserError("--train times recipes as they train: leave out --how, --checkpoint and --peers.")
    entries = [Entry.of(word) for word in options.recipe or [] if word.strip()]
    entries += [Entry(path, file=True) for path in options.checkpoint]
    if not entries and not options.peers and not against:
        raise UserError(
            "There is nothing to measure: give `--recipe R` or `--checkpoint C` (repeatable), or `--peers`."
        )
    machine = detect()
    asked = [(entry, load_entry(entry, options.overrides, machine)) for entry in against]
    for entry in entries:
        recipe = load_entry(entry, options.overrides, machine)
        own = "compiled" if recipe.strategy.compile else "eager"
        hows: tuple[Any, ...] = ("training",) if options.train else options.how or (own,)
        asked += [(replace(entry, how=how), recipe) for how in hows]
    asked += _peers(PEERS, options, machine, console) if options.peers else []
    on_gpu = asked[0][1].strategy.accelerator == "gpu"
    if not on_gpu and any(entry.how.endswith("graph") for entry, _ in asked):
        raise UserError("--how graph is for CUDA devices, and this runs on a CPU. Take eager or compiled.")
    if options.compile_mode is not None:
        mode = check_mode(options.compile_mode, [entry for entry, _ in asked])
        asked = [(replace(entry, mode=mode), recipe) for entry, recipe in asked]

    def tell(text: str) -> None:
        console.print(Text(text, "dim"), soft_wrap=True)

    contenders = build_contenders(asked, tell)
    import torch

    device = torch.device("cuda" if on_gpu else "cpu")
    recipe = asked[0][1]
    where = machine.gpus[0].name if on_gpu else f"{torch.get_num_threads()} CPU threads"
    conditions = environment(machine)

    def keep(rows: Sequence[Row]) -> None:
        """After each batch size, so that a run that is cut short leaves what it measured."""
        if options.output is None:
            return
        figures = {
            "model": recipe.model.name,
            "size": next((one.size for one in contenders if isinstance(one, Contender)), None),
            "training": options.train,
            "rounds": options.rounds,
            "rows": [row.plain() for row in rows],
            "attention_kernels": choices(),
            "environment": conditions,
        }
        write_json(options.output, figures)

    rows = measure_models(
        contenders, options.batch, device, rounds=options.rounds, seconds=options.seconds, progress=tell, keep=keep
    )
    print_models(console, rows, f"{recipe.model.name}, {'training' if options.train else 'inference'}, {where}")
    _all_ran(rows)


def _all_ran(rows: Sequence[Row]) -> None:
    """Say at the end who did not run, by the exit code too."""
    failed = [row for row in rows if row.failed is not None]
    if failed:
        lines = "\n".join(f"  {row.name} ({row.how}), batch {row.batch}: {row.failed}" for row in failed)
        raise UserError(f"{len(failed)} of {len(rows)} could not be measured. The other figures stand.\n{lines}")


def _peers(
    peers: Sequence[Entry], options: argparse.Namespace, machine: Machine, console: Console
) -> list[tuple[Entry, Recipe]]:
    """Those that this machine can run; the others are named with their reason."""
    from vit_efficient.engine.contenders import load_entry

    found = []
    for entry in peers:
        try:
            found.append((entry, load_entry(entry, options.overrides, machine)))
        except UserError as error:
            reason = " ".join(str(error).split())
            console.print(f"[yellow]left out[/] {entry.name}: {reason}", soft_wrap=True)
    return found


def benchmark_data(options: argparse.Namespace, console: Console) -> None:
    """Run `benchmark data`."""
    from vit_efficient.engine.rundir import write_json
    from vit_efficient.engine.trainer import quiet
    from vit_efficient.machine import detect
    from vit_efficient.measure.data import measure_data, print_data
    from vit_efficient.measure.record import environment

    quiet()
    _seconds(options.seconds)
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


def _seconds(seconds: float) -> None:
    if not seconds > 0:
        raise UserError(f"--seconds {seconds:g} is not above 0")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False)
    tool, rest = (words[0], words[1:]) if words else ("", [])
    if tool == "data":
        benchmark_data(data_parser().parse_args(rest), console)
    elif tool == "training":
        from vit_efficient.engine import training_times

        training_times.main(rest, console)
    elif tool == "kernels":
        from vit_efficient.measure import kernels

        kernels.main(rest)
    elif tool == "attention":
        from vit_efficient.measure import attention

        attention.main(rest)
    else:
        benchmark_models(model_parser().parse_intermixed_args(words), console)


if __name__ == "__main__":
    run_command(main)
