from __future__ import annotations

import io
import logging
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from vit_efficient import bars


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Holds what the clock says."""
    clock = [1000.0]
    monkeypatch.setattr(bars, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def test_a_log_file_gets_whole_lines_now_and_then(now: list[float]) -> None:
    file = io.StringIO()
    with bars.progress(Console(file=file, width=30), "images") as report:
        report("train", 0, 2_000_000, 0)
        for done in range(1, 21):
            now[0] += 1.5
            report("train", done * 1000, 2_000_000, done * 10**8)
        logging.getLogger("vit_efficient.data").warning("left out: cat.jpg")
        report("val", 0, 3)
        report("val", 3, 3)
    lines = file.getvalue().splitlines()
    rows = [line for line in lines if line.startswith("train:")]
    assert len(rows) == 2  # of 30 s, every 10, at the first report after that
    assert all(re.fullmatch(r"train: [\d,]+ of 2,000,000 images, [\d,]+/s, [\d,]+ MB, .+ s left", row) for row in rows)
    assert re.findall(r"train: ([\d,]+) of.*, ([\d,]+)/s", rows[-1]) == [("14,000", "667")]
    assert [line for line in lines if "cat.jpg" in line]
    assert re.fullmatch(r"val: 3 of 3 images, [\d,]+/s", lines[-1])


def test_a_run_that_goes_on_counts_its_own_speed(now: list[float]) -> None:
    file = io.StringIO()
    with bars.progress(Console(file=file), "shards") as report:
        report("train", 1_000_000, 1_000_002, 5)
        now[0] += 0.5
        report("train", 1_000_002, 1_000_002, 6)
    speed = float(re.search(r", ([\d.]+)/s", file.getvalue())[1])  # type: ignore[index]
    assert speed == 4


def test_a_terminal_gets_a_bar_for_each_part() -> None:
    file = io.StringIO()
    with bars.progress(Console(file=file, force_terminal=True, width=120), "images") as report:
        for done in range(5):
            report("train", done, 4, done * 10**6)
            time.sleep(0.01)
        report("val", 1, 2)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).splitlines()
    assert any(re.search(r"train .*4/4 +[\d,.]+ images/s +4 MB", line) for line in shown)
    assert any(re.search(r"val .*1/2", line) for line in shown)
    assert report.parts == {"train", "val"}
