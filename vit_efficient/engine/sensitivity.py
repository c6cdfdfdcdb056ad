"""Sensitivity as a command runs it: measured, printed, drawn, and written beside the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from vit_efficient.bars import progress
from vit_efficient.engine.rundir import write_json
from vit_efficient.errors import UserError
from vit_efficient.measure.logits import tango
from vit_efficient.measure.sensitivity_plot import draw
from vit_efficient.measure.sensitivity_table import plain, sensitivity_table
from vit_efficient.measure.units import size
from vit_efficient.quantization.auto_keep import Choice
from vit_efficient.quantization.auto_keep import choose_keep as choose
from vit_efficient.quantization.base import AutoKeep
from vit_efficient.quantization.mixture import Mixture
from vit_efficient.quantization.sensitivity import Record, measure, subjects


def run_sensitivity(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Sequence[Tensor],
    labels: Tensor | None,
    out: Path,
    console: Console,
    *,
    title: str = "quantized",
    dtype: torch.dtype = torch.float32,
) -> list[Record]:
    """Measure every layer, role, block and protection; print a table; write ``<out>.sensitivity.json`` and ``.png``.

    Call it under the autocast of the run. Both models are left as they are, in evaluation mode.

    Args:
        float_model: the full-precision model.
        quantized_model: the same, quantized and calibrated, without adapters, on the same device.
        batches: normalised calibration images on that device, each (B, 3, P, P).
        labels: their classes, or None.
        out: what is written lies beside it, under its name without the suffix.
        console: for the table and the progress.
        title: model and scheme, for the table and the picture.
        dtype: the precision in which layers that stay in floating point are stored.

    Raises:
        UserError: see `Mixture` and `measure`.
    """
    mixture = Mixture(float_model, quantized_model, dtype)
    with progress(console, "runs") as report:
        records = measure(
            mixture, subjects(mixture), batches, labels,
            lambda done, total: report("sensitivity", done, total),
        )  # fmt: skip
    console.print(sensitivity_table(records, title))
    figures, picture = written_beside(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(figures, plain(records))
    draw(records, title, picture)
    console.print(f"every layer is in {figures}; the picture is {picture}", soft_wrap=True)
    return records


def written_beside(out: Path) -> tuple[Path, Path]:
    """The figures and the picture that `run_sensitivity` writes."""
    figures, picture = (out.with_name(f"{out.stem}.sensitivity.{kind}") for kind in ("json", "png"))
    return figures, picture


def check_unwritten(out: Path) -> None:
    """See that the figures and the picture can be written beside `out`; that file itself may be there.

    Raises:
        UserError: one of them is there already.
    """
    for path in written_beside(out):
        if path.exists():
            raise UserError(f"{path} already exists, and is never overwritten. Choose another name for --out.")


def choose_keep(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Sequence[Tensor],
    labels: Tensor | None,
    budget: AutoKeep,
    console: Console,
    *,
    records: Sequence[Record] = (),
    dtype: torch.dtype = torch.float32,
) -> tuple[str, ...]:
    """Decide `keep: auto`, and say what was chosen and why.

    Args:
        float_model: see `run_sensitivity`, also for the next three.
        quantized_model: with every layer quantized that the scheme can quantize: what is float in it stays so.
        batches: see there.
        labels: see there.
        budget: the limits.
        console: for the progress and the decision.
        records: of `run_sensitivity` on the same models and images, to spare the measuring.
        dtype: see there.

    Returns:
        Layer names, to be written into the recipe as `quantization.keep`.

    Raises:
        UserError: the budget cannot be met; see `auto_keep.choose_keep`.
    """
    mixture = Mixture(float_model, quantized_model, dtype)
    with progress(console, "runs") as report:
        choice = choose(
            mixture, batches, budget, labels, records, lambda done, total: report("keep: auto", done, total)
        )
    for line in describe(choice, budget):
        console.print(line, soft_wrap=True)
    return choice.keep


def describe(choice: Choice, budget: AutoKeep) -> list[str]:
    """The decision in words, a line each."""
    n, many = choice.record.logits.n, len(choice.plain.subject.layers)
    lines = [
        f"keep: auto keeps {len(choice.chosen)} of {many} layers: {', '.join(choice.chosen) or 'none is needed'}",
        f"  with them  {_figures(choice.record)}, {size(choice.weight_bytes)}",
        f"  without    {_figures(choice.plain)}, {size(choice.plain_bytes)}",
    ]
    limit = budget.drop_limit
    if limit is not None and n * limit < 100:
        lines.append(f"  {n} images tell drops apart in steps of {100 / n:.2f} points, more than max_drop={limit:g}")
    return lines


def _figures(record: Record) -> str:
    if record.lost is None or record.gained is None:
        drop = "no labels"
    else:
        low, high = (100 * end for end in tango(record.lost, record.gained, record.logits.n))
        drop = f"top-1 drop {record.drop:+.2f} points (95 %: {low:+.1f} to {high:+.1f})"
    return f"{drop}, agreement {100 * record.logits.agreement:.1f} %, KL {record.logits.kl:.2g}"
