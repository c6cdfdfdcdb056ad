"""Quantize a pretrained model without training it; look at what each layer costs; check a file's arithmetic.

python -m vit_efficient.quantize --recipe int8_sdpa protocol=... model.weights=W data.shards=D --out model.safetensors
python -m vit_efficient.quantize --recipe int8_sdpa ... --sensitivity --out model.safetensors
python -m vit_efficient.quantize --verify model.safetensors data.shards=D
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vit_efficient.cli import USER_ERROR, Parser, base_parser, output_file, run_command
from vit_efficient.errors import RecipeError, UserError
from vit_efficient.machine import detect
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

VERIFIED_IMAGES = 32
LOW_AGREEMENT = 0.8  # with full precision; below it a person is warned


def parser() -> Parser:
    """The command line of `quantize`."""
    words = base_parser(
        "quantize",
        "Quantize a pretrained model without training it, and compare it with full precision.",
        required=False,
    )
    words.add_argument("--out", type=Path, metavar="MODEL", help="the model file to write, NAME.safetensors")
    words.add_argument(
        "--sensitivity",
        action="store_true",
        help="quantize one layer, role and block at a time instead, and say what each loses; "
        "writes NAME.sensitivity.json and .png beside --out",
    )
    words.add_argument(
        "--verify",
        type=Path,
        metavar="MODEL",
        help="compare the codes of a written integer model between all backends that are here, layer by layer",
    )
    words.add_argument("--onnx", type=Path, metavar="FILE", help="with --verify: the same model as exported to ONNX")
    words.add_argument("--output", type=output_file, metavar="FILE.json", help="write the figures to this file")
    return words


def resolved(name: str, overrides: Sequence[str], console: Console) -> Recipe:
    """The recipe, made concrete for this machine.

    Raises:
        RecipeError: it cannot run here.
    """
    machine = detect()
    loaded = load_recipe(name, overrides)
    recipe, notes = resolve(loaded.recipe, machine)
    for note in [*loaded.notes, *notes]:
        console.print(f"[bold]{'resolved':>13}[/]  {note}", soft_wrap=True)
    if problems := check(recipe, machine, chooses_layers=True):
        raise RecipeError(problems)
    return recipe


def quantize(options: argparse.Namespace, console: Console) -> None:
    """Run `quantize --recipe R --out MODEL`, with or without `--sensitivity`."""
    if options.onnx is not None:
        raise UserError("--onnx is for `--verify MODEL`: it names the same model as exported to ONNX.")
    if options.recipe is None or options.out is None:
        raise UserError("quantize needs `--recipe R` and `--out MODEL.safetensors`; or `--verify MODEL`.")
    from vit_efficient.engine.trainer import quiet

    quiet()  # before libraries are imported that talk while they are
    from vit_efficient.engine import quantizing
    from vit_efficient.engine.merging import check_free
    from vit_efficient.engine.rundir import write_json
    from vit_efficient.engine.sensitivity import check_unwritten
    from vit_efficient.measure.units import duration

    if not options.sensitivity:
        check_free(options.out)
    elif options.output is not None:
        raise UserError(
            "--output is for the figures of a model that is written. With --sensitivity they are in "
            f"{options.out.stem}.sensitivity.json beside --out: leave out --output."
        )
    else:
        check_unwritten(options.out)
    recipe = resolved(options.recipe, options.overrides, console)
    started = time.monotonic()
    subject = quantizing.load_subject(recipe)
    for note in subject.notes:
        console.print(f"[bold]{'model':>13}[/]  {note}", soft_wrap=True)
    if options.sensitivity:
        quantizing.sensitivity(subject, options.out, console)
        return
    made = quantizing.quantize(subject, console)
    for line in [*made.report.lines(), *made.lines]:
        console.print(f"[bold]{'quantized':>13}[/]  {line}", soft_wrap=True)
    quantizing.write(subject, made, options.out)
    found = quantizing.compare_file(subject, options.out, console)
    figures = {**found.figures(), "seconds": time.monotonic() - started}
    console.print(table(f"{recipe.variant}: {recipe.model.name}", found, duration(figures["seconds"])))
    if found.logits.agreement < LOW_AGREEMENT:
        text = (
            f"only {found.logits.agreement:.0%} of the predictions are those of full precision: do not use this model."
        )
        advice = "Take more bits, calibration (quantization.calibration={}), or keep more layers in full precision"
        console.print(f"[bold red]{'warning':>13}[/]  {text} {advice} (--sensitivity says which).", soft_wrap=True)
    again = f"; `evaluate --checkpoint {options.out}` counts it again" if found.drop is not None else ""
    console.print(f"written to {options.out}{again}", soft_wrap=True)
    if options.output is not None:
        write_json(options.output, figures)


def table(title: str, found: quantizing.Comparison, seconds: str) -> Table:  # type: ignore[name-defined]  # noqa: F821
    """What quantization cost and saved."""
    from vit_efficient.measure.table import accuracy, percent
    from vit_efficient.measure.units import size

    drop, logits = found.drop, found.logits
    rows = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    rows.add_column(style="bold")
    rows.add_column()
    if drop is not None:
        rows.add_row("top-1", accuracy(drop.top1, drop.n))
        rows.add_row("full precision", percent(drop.top1_reference))
        rows.add_row("drop", str(drop))
    else:
        rows.add_row("images", f"{logits.n:,}, whose labels are not the model's classes: no top-1")
    rows.add_row("same prediction", percent(logits.agreement))
    rows.add_row("KL divergence", f"{logits.kl:.4f}")
    rows.add_row("logit SNR", f"{logits.snr_db:.1f} dB")
    rows.add_row(
        "size",
        f"{size(found.file_bytes)} on disk, {size(found.device_bytes)} on the device, "
        f"{found.file_bytes / found.fp32_bytes:.3f} of fp32 ({size(found.fp32_bytes)})",
    )
    rows.add_row("time", seconds)
    return rows


def verify(options: argparse.Namespace, console: Console) -> int:
    """Run `quantize --verify MODEL`; the exit code."""
    from vit_efficient.engine.trainer import quiet

    quiet()
    from vit_efficient.attention.sdpa import SdpaConfig
    from vit_efficient.engine import quantizing
    from vit_efficient.engine.deployed import load_file
    from vit_efficient.engine.setup import build_data
    from vit_efficient.engine.subject import find
    from vit_efficient.engine.verify import run_verify

    for word, given in (("--sensitivity", options.sensitivity), ("--out", options.out), ("--output", options.output)):
        if given:
            raise UserError(f"--verify compares a written model and writes nothing: leave out {word}.")
    path, described = find(str(options.verify), "--verify")
    if path.suffix != ".safetensors" or described is None:
        raise UserError(f"--verify {options.verify}: give a model file, or the folder of a finished run.")
    recipe = resolved(options.recipe or str(described), options.overrides, console)
    deployed = load_file(path, attention=SdpaConfig() if options.onnx else recipe.attention)
    data = build_data(recipe)
    data.image = deployed.image
    subject = quantizing.Subject(
        recipe, deployed.model, deployed.image, data, quantizing.training_device(recipe), deployed.parameters, []
    )
    batches, left = [], VERIFIED_IMAGES
    for images, _ in quantizing.evaluation_images(subject):
        batches.append(images[:left])
        left -= len(batches[-1])
        if left <= 0:
            break
    result = run_verify(deployed.model.to(subject.device), deployed.image, batches, console, onnx=options.onnx)
    return 0 if result.ok else USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; raises UserError for what the user can mend."""
    options, console = parser().parse_intermixed_args(argv), Console(highlight=False)
    if options.verify is not None:
        return verify(options, console)
    quantize(options, console)
    return 0


if __name__ == "__main__":
    run_command(main)
