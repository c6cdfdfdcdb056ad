"""What `compare` prints and writes of groups of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from vit_efficient.measure.comparison import Difference, Group, Run, difference
from vit_efficient.measure.table import percent
from vit_efficient.measure.units import size, wilson


def comparison_table(groups: Sequence[Group], baseline: Group | None) -> Table:
    """One row a variant; accuracies in per cent, differences in points of top-1."""
    recipe = groups[0].runs[0].recipe
    table = Table(title=f"{recipe.protocol}: {recipe.model.name}", title_justify="left", title_style="bold")
    table.add_column("variant", style="bold")
    table.add_column("precision")
    for name in ("runs", "top-1", "deviation", "range"):
        table.add_column(name, justify="right", no_wrap=True)
    if baseline is not None:
        table.add_column(f"to {baseline.label}, by seed", justify="right", no_wrap=True)
    for name in ("on disk", "of fp32", "images/s", "peak memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        table.add_row(*_cells(group, baseline))
    return table


def _cells(group: Group, baseline: Group | None) -> list[str]:
    tops = [run.top1 for run in group.runs]
    deviation = "" if group.deviation is None else f"{100 * group.deviation:.2f}"
    span = f"{100 * min(tops):.2f} to {100 * max(tops):.2f}" if len(tops) > 1 else ""
    cells = [group.label, group.precision, str(len(tops)), percent(group.mean), deviation, span]
    if baseline is not None:
        cells.append("" if group is baseline else _points(difference(group, baseline), len(tops)))
    weight, full = group.average("weight_bytes"), group.average("fp32_bytes")
    speed = f"{group.average('images_per_second'):,.0f}"
    return [*cells, size(weight), f"{weight / full:.2f}", speed, size(_peak(group))]


def _peak(group: Group) -> int:
    return max(run.metrics["peak_memory_bytes"] for run in group.runs)


def _points(found: Difference | None, runs: int) -> str:
    if found is None:
        return "no seed in common"
    width = found.half_width
    text = f"{100 * found.mean:+.2f}" + ("" if width is None else f" ±{100 * width:.2f}")
    pairs = len(found.by_seed)
    return text if pairs == runs else f"{text} ({pairs} of {runs})"


def notes(groups: Sequence[Group], baseline: Group | None) -> list[str]:
    """What a reader must know to read the table rightly."""
    runs = [run for group in groups for run in group.runs]
    samples = runs[0].metrics["samples"]
    low, high = wilson(runs[0].top1, samples)
    lines = [
        f"top-1 on {samples:,} images: one run's figure is uncertain by ±{50 * (high - low):.2f} points (95 %). "
        "Where all runs see the same images, most of that cancels in the differences."
    ]
    if baseline is None:
        lines.append("No differences: there is no plain fp32 variant, or more than one. Name one with --baseline.")
    else:
        lines.append("± of a difference: 95 % interval of its mean over seeds (Student's t); few seeds make it wide.")
    places = sorted({conditions(run) for run in runs})
    lines.append("Measured on " + "; ".join(places) + ".")
    if len(places) > 1:
        lines.append("Speeds and memory of different machines or versions are not comparable.")
    return lines


def conditions(run: Run) -> str:
    """Device and versions of a run, as far as it says."""
    gpus = [gpu["name"] for gpu in run.environment.get("gpus", ())]
    on_gpu = run.recipe.strategy.accelerator == "gpu" and bool(gpus)
    packages = run.environment.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("torch", "timm") if name in packages]
    return ", ".join([gpus[0] if on_gpu else run.recipe.strategy.accelerator.upper(), *versions])


def as_plain(groups: Sequence[Group], baseline: Group | None) -> dict[str, Any]:
    """The table as plain values for a JSON file; accuracies and differences as fractions of 1."""
    return {
        "protocol": groups[0].runs[0].recipe.protocol,
        "baseline": None if baseline is None else baseline.label,
        "variants": [_plain(group, baseline) for group in groups],
    }


def _plain(group: Group, baseline: Group | None) -> dict[str, Any]:
    found = None if baseline is None else difference(group, baseline)
    return {
        "variant": group.label,
        "precision": group.precision,
        "top1": {
            "mean": group.mean,
            "deviation": group.deviation,
            "smallest": min(run.top1 for run in group.runs),
            "largest": max(run.top1 for run in group.runs),
        },
        "difference": None
        if found is None
        else {"mean": found.mean, "half_width": found.half_width, "by_seed": dict(found.by_seed)},
        "weight_bytes": group.average("weight_bytes"),
        "fp32_bytes": group.average("fp32_bytes"),
        "images_per_second": group.average("images_per_second"),
        "peak_memory_bytes": _peak(group),
        "runs": [
            {"path": str(run.path), "seed": run.seed, "top1": run.top1, "conditions": conditions(run)}
            for run in group.runs
        ],
    }
