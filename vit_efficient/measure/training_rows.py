"""What training runs took, held against the first of them and against what was predicted; and the table of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

COLUMNS = (
    ("images/s", 9), ("each", 8), ("x", 6), ("range", 12), ("ms", 7), ("model", 8), ("peak GiB", 8), ("counted", 8),
)  # fmt: skip
GIB = 2**30


@dataclass(frozen=True)
class TrainingRow:
    """One recipe at one batch size; seconds and bytes.

    Args:
        name: what people call it.
        how: strategy, precision and the like, on one line.
        world: processes.
        batch: images of each in an optimizer step.
        micro_batch: images that each holds at once.
        rounds: seconds of every measured step, of the slowest rank, run by run.
        loss: of the last step, of rank 0.
        peak: bytes of the allocator at most, of the rank with most; None on a CPU.
        reserved: bytes that the allocator took at most, likewise.
        estimated: what `fit --dry-run` estimates of `peak`; None: it cannot be.
        predicted: images a second of each device by docs/scaling.md's model; None: not known of this device.
        failed: type and message of the error, where there was one.
        words: recipe and overrides.
    """

    name: str
    how: str
    world: int
    batch: int
    micro_batch: int
    rounds: tuple[tuple[float, ...], ...] = ()
    loss: float | None = None
    peak: int | None = None
    reserved: int | None = None
    estimated: int | None = None
    predicted: float | None = None
    failed: str | None = None
    words: tuple[str, ...] = ()

    @property
    def medians(self) -> list[float]:
        """Seconds a step, of each round."""
        return [statistics.median(seconds) for seconds in self.rounds]

    @property
    def seconds(self) -> float:
        """Of a step: median over all rounds."""
        return statistics.median(second for seconds in self.rounds for second in seconds)

    @property
    def each(self) -> float:
        """Images a second of one device."""
        return self.batch / self.seconds

    def against(self, first: TrainingRow) -> tuple[float, float, float]:
        """Each device's images a second over those of another row: (median, lowest, highest) over the rounds."""
        ratios = [
            (self.batch / own) / (first.batch / other)
            for own, other in zip(self.medians, first.medians, strict=False)  # a round may be under way
        ]  # fmt: skip
        return statistics.median(ratios), min(ratios), max(ratios)

    def plain(self, first: TrainingRow | None) -> dict[str, Any]:
        """As a mapping for a JSON file."""
        row = asdict(self)
        if self.rounds:
            row |= {"seconds": self.seconds, "medians": self.medians, "images_per_second_each": self.each}
            row["images_per_second"] = self.each * self.world
            if first is not None:
                row["relative"], *row["relative_range"] = self.against(first)
        return row


def first_that_ran(rows: Sequence[TrainingRow], batch: int) -> TrainingRow | None:
    """What the others of a batch size are held against."""
    return next((row for row in rows if row.batch == batch and row.rounds), None)


def print_rows(console: Console, rows: Sequence[TrainingRow], title: str) -> None:
    """A table for each batch size. Each row has two lines, its name and its figures."""
    for batch in dict.fromkeys(row.batch for row in rows):
        first = first_that_ran(rows, batch)
        _say(console, f"\n{title}, {batch} images a device in a step", "bold")
        _say(console, _aligned([name for name, _ in COLUMNS]), "dim")
        for row in (row for row in rows if row.batch == batch):
            console.print(Text.assemble(row.name, (f"  {row.how}", "dim")), soft_wrap=True)
            if row.failed is not None:
                _say(console, f"  failed: {row.failed}", "red")
            else:
                assert first is not None, "this one ran"
                _say(console, _aligned(_cells(row, first)), "")
        if first is not None:
            runs = "1 run" if len(first.rounds) == 1 else f"{len(first.rounds)} runs"
            said = (
                f"\neach: images a second of one device. x: that, over {first.name}'s: median and range over {runs} of "
                "each, in turn. ms: of a step, the slowest rank's, median. model: `each` by docs/scaling.md. counted: "
                "peak by `fit --dry-run`, without the CUDA context."
            )
            _say(console, said, "dim")


def _say(console: Console, text: str, style: str) -> None:
    console.print(Text(text, style), soft_wrap=True)


def _aligned(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def _cells(row: TrainingRow, first: TrainingRow) -> list[str]:
    middle, low, high = row.against(first)
    return [
        _rate(row.each * row.world),
        _rate(row.each),
        f"{middle:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{1e3 * row.seconds:.1f}",
        _rate(row.predicted),
        "-" if row.peak is None else f"{row.peak / GIB:.1f}",
        "-" if row.estimated is None else f"{row.estimated / GIB:.1f}",
    ]


def _rate(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"
