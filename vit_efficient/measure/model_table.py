"""The tables of the model benchmark: one a batch size, no wider than 80 letters but for long names and reasons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from vit_efficient.measure.models import Row
from vit_efficient.measure.units import size

COLUMNS = (
    ("images/s", 8), ("x", 5), ("range", 11), ("mean", 6), ("p50", 6), ("p95", 6), ("p99", 6), ("weights", 7),
    ("steady", 7), ("peak", 7),
)  # fmt: skip


def print_models(console: Console, rows: Sequence[Row], title: str) -> None:
    """A table for each batch size, and the first contender named as what the others are held against.

    Each contender has two lines, its name and its figures, so that no name is cut.
    """
    for batch in dict.fromkeys(row.batch for row in rows):
        _say(console, f"\n{title}, batch {batch}", "bold")
        _say(console, _aligned([name for name, _ in COLUMNS]), "dim")
        for row in (row for row in rows if row.batch == batch):
            _print(console, row)
    first = next((row for row in rows if row.failed is None), None)
    if first is not None:
        said = (
            f"\nx: times as fast as {first.name} ({first.how}), median and range over {len(first.rounds)} rounds in "
            "which all took turns. mean, p50, p95, p99: milliseconds of a call."
        )
        _say(console, said, "dim")


def _print(console: Console, row: Row) -> None:
    mode = "" if row.compile_mode is None else f" {row.compile_mode}"
    console.print(Text.assemble(row.name, (f"  {row.how}{mode}, {row.dtype}", "dim")), soft_wrap=True)
    if row.failed is not None:
        _say(console, f"  failed: {row.failed}", "red")
    else:
        _say(console, _aligned(list(_cells(row))), "")


def _say(console: Console, text: str, style: str) -> None:
    console.print(Text(text, style), soft_wrap=True)


def _aligned(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def _cells(row: Row) -> Iterator[str]:
    assert row.images_per_second is not None
    assert row.speedup is not None
    assert row.speedup_range is not None
    low, high = row.speedup_range
    yield f"{row.images_per_second:,.{0 if row.images_per_second >= 100 else 1}f}"
    yield f"{row.speedup:.2f}"
    yield f"{low:.2f}-{high:.2f}"
    for seconds in (row.mean, row.p50, row.p95, row.p99):
        assert seconds is not None
        yield milliseconds(seconds)
    for count in (row.weight_bytes, row.steady_bytes, row.peak_bytes):
        yield "-" if count is None else size(count)


def milliseconds(seconds: float) -> str:
    """Three figures that mean something: 0.0123 -> '12.3'."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}" if value < 1000 else f"{value:,.0f}"
