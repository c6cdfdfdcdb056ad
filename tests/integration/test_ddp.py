"""Two real processes train what one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
DDP = ("strategy=ddp", "strategy.devices=2", "strategy.accelerator=cpu", "data.workers=0")


def steps_of(audit: Path) -> list[tuple[str, str, str]]:
    return sorted((e, s, k) for e, s, _, k in (line.split() for line in audit.read_text().splitlines()))


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.long), 2])
def test_two_ranks_are_one_run(
    command: Callable[..., str],
    small: Sequence[str],
    tmp_path: Path,
    assert_same_curve: Callable[..., None],
    accumulate: int,
) -> None:
    """Same global batches, each sample once, the last short batch included; the same curves to float tolerance."""
    plain = ("--recipe", "fp32_sdpa", *small, "run.log_every=1")
    command("fit", *plain, "run.dir=one", "data.audit=one.txt")
    command("fit", *plain, *DDP, f"strategy.micro_batch={64 // accumulate}", "run.dir=two", "data.audit=two.txt")
    assert steps_of(tmp_path / "one.txt") == steps_of(tmp_path / "two.txt")
    ranks = {line.split()[2] for line in (tmp_path / "two.txt").read_text().splitlines()}
    assert ranks == {"0", "1"}
    one, two = (json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("one", "two"))
    assert two["samples"] == 360  # evaluated once each, though 360 images do not fill both ranks' batches
    assert [h["loss"] for h in two["history"]] == pytest.approx([h["loss"] for h in one["history"]], rel=1e-4)
    assert_same_curve(tmp_path / "two", tmp_path / "one", rel=1e-4, steps=36)


@pytest.mark.long
def test_without_a_name_there_is_one_folder(command: Callable[..., str], small: Sequence[str], tmp_path: Path) -> None:
    """The second process starts when the first has made the run's folder; it takes that, and does not make another."""
    printed = command("fit", "--recipe", "fp32_sdpa", *small, *DDP)
    (run,) = (tmp_path / "runs").iterdir()
    assert f"run folder   runs/{run.name}" in printed
    assert json.loads((run / "metrics.json").read_text())["samples"] == 360


def test_both_ranks_stop_after_the_same_step(
    start: Callable[..., subprocess.Popen[str]], command: Callable[..., str], small: Sequence[str], tmp_path: Path
) -> None:
    """A signal to one process stops both, saved; the run goes on in a single process with the same samples."""
    words = ("--recipe", "fp32_sdpa", *small, "optim.epochs=12", "data.audit=a.txt", "run.dir=run")
    words = tuple(w for w in words if w != "optim.epochs=3")
    process = start("fit", *words, *DDP)
    audit = tmp_path / "a.txt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if audit.exists() and len(audit.read_text().splitlines()) > 500:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    command("fit", "--resume", "run", "strategy=single")
    seen = steps_of(audit)
    assert len(seen) == len(set(seen)) == 12 * 1437


def test_both_ranks_find_the_base_that_they_trained(
    command: Callable[..., str], small: Sequence[str], tmp_path: Path
) -> None:
    command("fit", "--recipe", "int4_sdpa", *small, *DDP, "run.dir=run")
    (base,) = (tmp_path / "runs").glob("base-*")
    for folder in (base, tmp_path / "run"):
        assert json.loads((folder / "metrics.json").read_text())["steps"] == 36
