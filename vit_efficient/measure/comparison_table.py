"""What `compare` prints and writes of groups of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vit_efficient.measure.comparison import Difference, Group, Run, difference
from vit_efficient.measure.table import percent
from vit_efficient.measure.units import size, wilson

COST = ("on disk", "of fp32", "images/s", "peak memory")
ENDLESS = 10_000  # letters


def print_comparison(console: Console, groups: Sequence[Group], baseline: Group | None) -> None:
    """One row a variant; accuracies in per cent, differences in points of top-1. Where a terminal is too narrow for it,
    two tables: accuracy, then cost; columns that say nothing of single runs are left out."""
    recipe = groups[0].runs[0].recipe
    title = f"{recipe.protocol}: {recipe.model.name}"
    names = ["variant", "precision", "runs", "top-1", "deviation", "range"]
    names += [] if baseline is None else [f"to {baseline.label}, by seed"]
    rows = [dict(zip([*names, *COST], _cells(group, baseline), strict=True)) for group in groups]
    names = [name for name in names if name not in ("deviation", "range") or any(row[name] for row in rows)]
    whole = _table(title, [*names, *COST], rows)
    if console.measure(whole, options=console.options.update(width=ENDLESS)).maximum <= console.width:
        console.print(whole)
        return
    folded = [row | {"range": row["range"].replace(" to ", " to\n")} for row in rows]
    console.print(_table(title, [name for name in names if name != "precision"], folded, narrow=True))
    console.print(_table("", ["variant", "precision", *COST], rows, narrow=True))


def _table(title: str, names: Sequence[str], rows: Sequence[Mapping[str, str]], *, narrow: bool = False) -> Table:
    """`narrow`: names of columns go on in a further line where they are longer than what is below them."""
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for name in names:
        pieces = [*(name.split() if narrow else [name]), *(line for row in rows for line in row[name].split("\n"))]
        side: Literal["left", "right"] = "left" if name in ("variant", "precision") else "right"
        table.add_column(name, justify=side, style="bold" if name == "variant" else None, width=max(map(len, pieces)))
    for row in rows:
        table.add_row(*(row[name] for name in names))
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
