"""The tables of the model benchmark: one a batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from vit_efficient.measure.models import Row
from vit_efficient.measure.units import size


def print_models(console: Console, rows: Sequence[Row], title: str) -> None:
    """A table for each batch size, and the first contender named as what the others are held against."""
    for batch in dict.fromkeys(row.batch for row in rows):
        console.print(_table([row for row in rows if row.batch == batch], f"{title}, batch {batch}"))
    first = next((row for row in rows if row.failed is None), None)
    if first is not None:
        console.print(
            f"[dim]x: times as fast as {first.name} ({first.how}), median and range over {len(first.rounds)} rounds "
            "in which all took turns. ms: one call, median and 99th percentile.[/]",
            soft_wrap=True,
        )


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("images/s", "x", "range", "ms", "p99", "weights", "peak"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(f"{row.name}\n[dim]{row.how}, {row.dtype}[/]", *_cells(row))
    return table


def _cells(row: Row) -> Iterator[str]:
    if row.failed is not None:
        yield f"[red]{row.failed.split(':')[0]}[/]"
        return
    assert row.images_per_second is not None
    assert row.speedup is not None
    assert row.speedup_range is not None
    assert row.p50 is not None
    assert row.p99 is not None
    low, high = row.speedup_range
    yield f"{row.images_per_second:,.{0 if row.images_per_second >= 100 else 1}f}"
    yield f"{row.speedup:.2f}"
    yield f"{low:.2f}-{high:.2f}"
    yield milliseconds(row.p50)
    yield milliseconds(row.p99)
    yield size(row.weight_bytes)
    yield size(row.peak_bytes) if row.peak_bytes is not None else "-"


def milliseconds(seconds: float) -> str:
    """Three figures that mean something: 0.0123 -> '12.3'."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}" if value < 1000 else f"{value:,.0f}"
