"""Evaluate a trained run, or a pretrained model quantized without training.

python -m vit_efficient.evaluate --recipe int8_sdpa --checkpoint runs/int8_sdpa-digits-...
python -m vit_efficient.evaluate --recipe int8_sdpa model.name=vit_tiny_patch16_224 model.weights=W data.eval_shards=D
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence

from rich.console import Console

from vit_efficient.cli import Parser, base_parser, output_file, run_command
from vit_efficient.errors import RecipeError, UserError
from vit_efficient.machine import detect
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe


def parser() -> Parser:
    """The command line of `evaluate`."""
    words = base_parser(
        "evaluate", "Count how good a trained run, or a pretrained model under a recipe, is.", required=False
    )
    words.add_argument(
        "--checkpoint",
        metavar="C",
        help="a run's folder, its model.safetensors, or one of its checkpoints; "
        "unset: `model.weights`, quantized without training",
    )
    words.add_argument("--output", type=output_file, metavar="FILE.json", help="write the figures to this file")
    return words


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    from vit_efficient.engine.evaluation import evaluate_model, speed_up
    from vit_efficient.engine.pretrained import require_labels
    from vit_efficient.engine.ranks import sum_over_ranks
    from vit_efficient.engine.rundir import write_json
    from vit_efficient.engine.setup import build_data, build_transforms
    from vit_efficient.engine.subject import find, from_checkpoint, from_weights
    from vit_efficient.engine.trainer import quiet
    from vit_efficient.measure.memory import peak_memory_bytes
    from vit_efficient.measure.table import result_table
    from vit_efficient.measure.units import duration

    quiet()
    path, recipe_file = find(options.checkpoint) if options.checkpoint else (None, None)
    name = options.recipe or (str(recipe_file) if recipe_file else None)
    if name is None:
        raise UserError("evaluate needs `--recipe R`, or `--checkpoint C` with a run's folder.")
    machine = detect()
    loaded = load_recipe(name, options.overrides)
    recipe, notes = resolve(loaded.recipe, machine)
    for note in [*loaded.notes, *notes]:
        console.print(f"[bold]{'resolved':>13}[/]  {note}", soft_wrap=True)
    if problems := check(recipe, machine):
        raise RecipeError(problems)
    if path is None and not (recipe.model.weights or getattr(recipe.quantization, "base", None)):
        raise UserError(
            "There is nothing to evaluate: give `--checkpoint` (a run's folder) or `model.weights=` (a file)."
        )

    started = time.monotonic()
    data = build_data(recipe)
    require_labels(recipe.model.num_classes, data)  # before a model is built, and perhaps calibrated, for nothing
    if path is not None:
        subject = from_checkpoint(path, recipe, data.num_classes)
    else:
        subject = from_weights(recipe, data.num_classes, data, console)
    data.image = subject.image
    for line in [*subject.lines, *speed_up(subject.model, recipe)]:
        console.print(f"[bold]{'model':>13}[/]  {line}", soft_wrap=True)
    transforms = build_transforms(recipe, subject.image, data.num_classes)
    ready = time.monotonic()
    figures, device_bytes, device = evaluate_model(subject.model, data, transforms, recipe)
    seconds = time.monotonic() - ready
    if not math.isfinite(figures["loss"]):
        raise UserError(
            f"The evaluation loss is {figures['loss']}: the model gives NaN or infinite logits for some image, so no "
            "figure of it means anything. Check its weights, or evaluate in quantization.precision=fp32."
        )
    metrics = {
        **{key: figures[key] for key in ("top1", "top5", "f1", "loss", "samples")},
        "epochs": 0,  # of training, by this command
        "steps": 0,
        "images_per_second": figures["samples"] / seconds,
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": peak_memory_bytes(device),
        "parameters": subject.parameters,
        "weight_bytes": subject.weight_bytes,
        "device_bytes": device_bytes,
        "fp32_bytes": 4 * subject.parameters,
        "skipped_samples": sum_over_ranks(data.skipped),
        "per_class": dict(zip(data.class_names, figures["per_class"].tolist(), strict=True)),
    }
    extra = [("time", f"{duration(seconds)}, {metrics['images_per_second']:,.0f} images/s with loading")]
    if metrics["skipped_samples"]:
        extra.append(("left out", f"{metrics['skipped_samples']} images that could not be read"))
    console.print(result_table(f"{recipe.variant}: {recipe.model.name}", metrics, extra))
    if options.output is not None:
        write_json(options.output, metrics)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can mend."""
    evaluate(parser().parse_intermixed_args(argv), Console(highlight=False))


if __name__ == "__main__":
    run_command(main)
