"""Runs that were submitted: where they stand, what they print, and how they are cancelled. A run is its folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vit_efficient.cluster import slurm
from vit_efficient.cluster.record import Job, attempts, outcomes, step_reached, submitted_runs
from vit_efficient.cluster.slurm import Queued, SlurmError
from vit_efficient.errors import UserError

COLOURS = {"RUNNING": "green", "PENDING": "yellow", "FAILED": "red", "TIMEOUT": "red", "NODE_FAIL": "red"}
# Why a job waits, where Slurm's word for it does not help.
REASONS = {
    "None": "waits",
    "BeginTime": "waits two minutes after a requeue",
    "PartitionConfig": "waits for ever: no node here has that many cores or GPUs",
    "PartitionNodeLimit": "waits for ever: the partition has not so many nodes",
    "PartitionTimeLimit": "waits for ever: its time is longer than the partition allows",
    "DependencyNeverSatisfied": "waits for ever: the run that it starts from has failed",
}
TAIL = 64 * 1024  # bytes of a log that are shown at first


@dataclass(frozen=True)
class Status:
    """Where one run stands.

    Args:
        run: its folder.
        job: its job.
        queued: what Slurm says.
        step: optimizer steps in its newest checkpoint.
        starts: how often it was started.
        top1: once it is finished.
        mistake: the first line of a message that ended it.
    """

    run: Path
    job: Job
    queued: Queued
    step: int
    starts: int
    top1: float | None = None
    mistake: str = ""

    @property
    def state(self) -> str:
        """A word: Slurm's, or what the folder shows once Slurm has forgotten the job."""
        if self.top1 is not None:
            return "finished"
        if self.job.cancelled and self.queued.ended:
            return "cancelled"
        if self.queued.state == "GONE":
            return "ended"
        return self.queued.state.lower().replace("_", " ")

    @property
    def note(self) -> str:
        """What a person would ask next."""
        if self.top1 is not None:
            return f"top-1 {100 * self.top1:.2f} %"
        if self.queued.state == "PENDING":
            return REASONS.get(self.queued.reason, self.queued.reason)
        if self.queued.state == "RUNNING":
            return f"{self.queued.nodes}, {self.queued.left} left"
        return self.mistake or ("" if self.job.cancelled else "see its log")


def status_of(runs: Sequence[Path]) -> list[Status]:
    """Where runs stand, in their order; one question to the queue for all of them."""
    jobs = [(run, Job.read(run)) for run in runs]
    queued = slurm.queue([job.number for _, job in jobs if job.number])
    return [_status(run, job, queued.get(job.number, Queued())) for run, job in jobs]


def _status(run: Path, job: Job, queued: Queued) -> Status:
    top1 = None
    if (run / "metrics.json").is_file():
        top1 = float(json.loads((run / "metrics.json").read_text(encoding="utf-8"))["top1"])
    said = [outcome.detail.splitlines()[0] for outcome in outcomes(run) if outcome.kind in ("mistake", "fault")]
    return Status(run, job, queued, step_reached(job.progress), len(attempts(run)), top1, said[0] if said else "")


def table(found: Sequence[Status]) -> Table:
    """A row a run."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("run", overflow="fold", style="cyan", ratio=3)
    shown.add_column("job", no_wrap=True)
    shown.add_column("state", no_wrap=True)
    shown.add_column("saved", no_wrap=True, justify="right")
    shown.add_column("starts", no_wrap=True, justify="right")
    shown.add_column("", overflow="fold", ratio=2)
    for one in found:
        colour = COLOURS.get(one.queued.state, "")
        state = f"[{colour}]{one.state}[/]" if colour and one.top1 is None else one.state
        shown.add_row(short(one.run), one.job.number, state, f"step {one.step}", str(one.starts), one.note)
    return shown


def short(path: Path) -> str:
    """As a person would write it from here, so that it can be given to the other commands."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def find(given: Sequence[Path], otherwise: Path) -> list[Path]:
    """The runs that a command means: run folders, or folders of runs; without any, those below `otherwise`.

    Raises:
        UserError: no run with a job there.
    """
    found: list[Path] = []
    for path in given or [otherwise]:
        runs = submitted_runs((path.absolute(),))
        if not runs:
            where = "there is no such folder" if not path.exists() else "no run in it was submitted to Slurm"
            raise UserError(f"{path}: {where}. Give a run's folder, or a folder of runs.")
        found += [run for run in runs if run not in found]
    return found


def follow(run: Path, console: Console, *, on: bool, interval: float = 1.0) -> None:
    """Print the end of what a run's job printed; with ``on``, go on until the job has ended.

    Raises:
        UserError: nothing was printed so far, and nobody waits for it.
    """
    log = Path(Job.read(run).log)
    if not log.is_file():
        (now,) = status_of([run])
        if not on or now.queued.ended:
            raise UserError(f"Job {now.job.number} has printed nothing so far. It is {now.state}: {now.note}.")
        console.print(f"[dim]job {now.job.number} is {now.state}: {now.note}; {log} will be shown as it comes[/]")
    place, asked, ended = None, time.monotonic(), False
    while True:
        if log.is_file():
            place = _print_from(log, place, console)
        if not on or ended:
            return
        if time.monotonic() - asked >= 5 * interval:  # the queue is asked less often than the file
            ended = status_of([run])[0].queued.ended  # then once more round: what was printed meanwhile
            asked = time.monotonic()
        time.sleep(interval)


def _print_from(log: Path, place: int | None, console: Console) -> int:
    """Print a file from a place on; None: from a line near its end. Returns where the next call goes on."""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(0, size - TAIL) if place is None else min(place, size)
        file.seek(begin)
        data = file.read()
    if place is None and begin:
        data = data.partition(b"\n")[2]
    console.out(data.decode(errors="replace"), end="", highlight=False)
    return size


def cancel(runs: Sequence[Path], console: Console, pause: Callable[[float], None] = time.sleep) -> None:
    """Cancel the jobs of runs; each saves and leaves, and is not started again.

    Raises:
        UserError: Slurm refused.
    """
    for one in status_of(runs):
        name = short(one.run)
        if one.queued.ended:
            console.print(f"{name}: job {one.job.number} has ended already ({one.state}).", soft_wrap=True)
            continue
        replace(one.job, cancelled=True).write(one.run)  # first: the job looks here before it starts itself again
        try:
            slurm.cancel(one.job.number)
        except SlurmError:  # it goes on, and shall be started again after a fault as before
            replace(Job.read(one.run), cancelled=one.job.cancelled).write(one.run)
            raise
        kept = f"it saves and ends; go on with it later: {one.job.again}" if one.starts else "it had not begun"
        console.print(f"{name}: job {one.job.number} is cancelled; {kept}", soft_wrap=True)
