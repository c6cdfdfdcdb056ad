"""Progress that people read: bars in a terminal, a line now and then in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vit_efficient.measure.units import duration

_EVERY = 10.0  # seconds between two lines of a log


class _Speed(ProgressColumn):
    """Items a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_rate(speed)} {self.unit}/s" if speed else "", style="progress.data.speed")


class _Volume(ProgressColumn):
    """Megabytes so far."""

    def render(self, task: Task) -> Text:
        volume = task.fields["volume"]
        return Text(f"{volume / 1e6:,.0f} MB" if volume else "", style="progress.download")


def _rate(speed: float) -> str:
    return f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"


class Report:
    """Told how far each part is; knows which parts there were."""

    def __init__(self) -> None:
        self.parts: set[str] = set()

    def __call__(self, part: str, done: int, total: int, volume: int = 0) -> None:
        """So many of so many are done.

        Args:
            part: what they are of.
            done: items.
            total: items.
            volume: bytes written or read for them; 0 if nobody counts.
        """
        self.parts.add(part)


class _Bars(Report):
    def __init__(self, bars: Progress) -> None:
        super().__init__()
        self._bars, self._tasks = bars, dict[str, TaskID]()

    def __call__(self, part: str, done: int, total: int, volume: int = 0) -> None:
        if part not in self.parts:
            # a run that goes on begins at `done`, which says nothing of the speed
            self._tasks[part] = self._bars.add_task(part, total=total, completed=done, volume=volume)
        super().__call__(part, done, total, volume)
        self._bars.update(self._tasks[part], completed=done, volume=volume)


class _Lines(Report):
    def __init__(self, console: Console, unit: str) -> None:
        super().__init__()
        self._console, self._unit = console, unit
        self._began = self._last = 0.0
        self._first = 0

    def __call__(self, part: str, done: int, total: int, volume: int = 0) -> None:
        now = time.monotonic()
        if part not in self.parts:
            self._began = self._last = now
            self._first = done
        super().__call__(part, done, total, volume)
        if now - self._last < _EVERY and done < total:
            return
        self._last = now
        speed = (done - self._first) / max(now - self._began, 1e-9)
        text = f"{part}: {done:,} of {total:,} {self._unit}"
        text += f", {_rate(speed)}/s" if speed else ""
        text += f", {volume / 1e6:,.0f} MB" if volume else ""
        text += f", {duration((total - done) / speed)} left" if speed and done < total else ""
        self._console.print(text, soft_wrap=True, highlight=False)


@contextmanager
def progress(console: Console, unit: str) -> Iterator[Report]:
    """Shows what is reported, part by part; warnings of the package appear above it.

    Args:
        console: where; bars if it is a terminal, otherwise a line every ten seconds.
        unit: what is counted, for example `images`.
    """
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logger = logging.getLogger("vit_efficient")
    logger.addHandler(handler)
    try:
        if not console.is_terminal:
            yield _Lines(console, unit)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Speed(unit),
            _Volume(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, refresh_per_second=5) as bars:
            yield _Bars(bars)
    finally:
        logger.removeHandler(handler)
