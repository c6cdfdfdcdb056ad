"""The tables that commands end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vit_efficient.measure.units import duration, size, wilson

SHOWN_CLASSES = 5


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def accuracy(share: float, samples: int) -> str:
    """A share with its 95 % interval and n: an accuracy without them says less than it seems to."""
    low, high = wilson(share, samples)
    return f"{percent(share)}  (95 %: {100 * low:.1f} to {100 * high:.1f}, n = {samples:,})"


def result_table(name: str, metrics: Mapping[str, Any], extra: Sequence[tuple[str, str]] = ()) -> Table:
    """Accuracy, size and time of one model.

    Args:
        name: what the table is about, for example ``int8_sdpa on digits``.
        metrics: the keys of ``metrics.json``.
        extra: further rows (what, value).
    """
    table = Table(title=name, show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="bold")
    table.add_column()
    table.add_row("top-1", accuracy(metrics["top1"], metrics["samples"]))
    table.add_row("top-5", percent(metrics["top5"]))
    table.add_row("macro F1", f"{metrics['f1']:.4f}")
    table.add_row("eval loss", f"{metrics['loss']:.4f}")
    worst = worst_classes(metrics["per_class"])
    if worst:
        table.add_row("weakest classes", ", ".join(f"{n} {percent(v)}" for n, v in worst))
    ratio = metrics["weight_bytes"] / metrics["fp32_bytes"]
    table.add_row(
        "size on disk",
        f"{size(metrics['weight_bytes'])}, {ratio:.2f} of fp32 ({size(metrics['fp32_bytes'])})",
    )
    for what, value in extra:
        table.add_row(what, value)
    return table


def worst_classes(per_class: Mapping[str, float | None]) -> list[tuple[str, float]]:
    """The classes with the lowest accuracy, those without evaluation images left out."""
    seen = [(name, value) for name, value in per_class.items() if value is not None and value == value]
    return sorted(seen, key=lambda row: row[1])[: min(SHOWN_CLASSES, max(0, len(seen) - 1))]


def print_result(console: Console, name: str, metrics: Mapping[str, Any], base_seconds: float = 0.0) -> None:
    """Print what a training run came to."""
    base = f", and {duration(base_seconds)} for its base" if base_seconds else ""
    extra = [
        ("time", duration(metrics["seconds"]) + base),
        ("speed", f"{metrics['images_per_second']:,.0f} images/s in training, "
                  f"{100 * metrics['data_wait_share']:.0f} % of it waiting for data"),
    ]  # fmt: skip
    if metrics["skipped_samples"]:
        extra.append(("left out", f"images that could not be read, {metrics['skipped_samples']} times in all epochs"))
    console.print(result_table(name, metrics, extra))
