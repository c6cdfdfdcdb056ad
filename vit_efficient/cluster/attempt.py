"""Before and after each start of a job: may it begin, and shall it begin again? Called by the job's own shell.

    python -m vit_efficient.cluster.attempt begin RUN          exit 0: go on; 2: not again, and a line says why
    python -m vit_efficient.cluster.attempt end RUN CODE       exit 75: start again; otherwise CODE
    python -m vit_efficient.cluster.attempt follow RUN JOB     another job goes on, as this one cannot be requeued

CODE is srun's. A time limit, a pre-emption, a process or a node that died: again, as long as the run gets further. A
mistake that only its user can mend, or `scancel`: not again.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from vit_efficient.cli import PEER_LOST, STALLED
from vit_efficient.cluster.record import (
    Attempt,
    Job,
    Outcome,
    add_attempt,
    attempts,
    clear_outcomes,
    note_outcome,
    outcomes,
    step_reached,
)
from vit_efficient.errors import UserError

AGAIN = 75  # EX_TEMPFAIL of sysexits.h
USER_ERROR = 2
# Codes with which a process ends itself at once, so that it notes nothing.
MEANINGS = {
    PEER_LOST: "another process of the run died",
    STALLED: "no progress for too long: stacks/ in the run's folder shows where",
}


def number_of(environment: Mapping[str, str]) -> str:
    """The job as Slurm's commands and people name it: ``17``, or ``17_3`` for a task of an array."""
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def begin(run: Path, environment: Mapping[str, str]) -> str:
    """Note this start.

    Returns:
        A line for the log.

    Raises:
        UserError: this run has started too often without getting further, or the nodes cannot find each other.
    """
    job, number = Job.read(run), number_of(environment)
    step = step_reached(job.progress)
    before = attempts(run)
    if number != job.number or job.cancelled:  # somebody asked for another go: `sbatch RUN/slurm/job.sh`
        before = []
    _check_progress(job, before, step)
    if int(environment.get("SLURM_NNODES", "1")) > 1:
        _check_address(environment.get("MASTER_ADDR", ""))
    replace(job, number=number, cancelled=False).write(run)
    clear_outcomes(run)
    add_attempt(run, Attempt(time.time(), number, environment.get("SLURM_JOB_NODELIST", ""), step))
    how = f"goes on from step {step}" if step else "begins"
    return f"job {number} on {environment.get('SLURM_JOB_NODELIST', '?')}, start {len(before) + 1}: {run.name} {how}"


def _check_progress(job: Job, before: Sequence[Attempt], step: int) -> None:
    in_vain = sum(1 for _ in takewhile(lambda attempt: attempt.step == step, reversed(before)))
    if in_vain > job.restarts:
        raise UserError(
            f"started {in_vain} times in a row without getting further than step {step}; not started again.\n"
            f"  What stopped it stands above, or in {job.log}.\n  Go on with it when that is mended: {job.again}"
        )


def _check_address(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {address!r}, which this node cannot find ({error}): the nodes would wait for each other "
            "for ever.\n  Set `environment: {MASTER_ADDR: ...}` in the site file."
        ) from None


def end(run: Path, code: int, *, preempted: bool) -> tuple[int, str]:
    """What to do after srun ended with ``code``.

    Args:
        run: the run's folder.
        code: srun's exit code.
        preempted: whether Slurm says that it takes the nodes away for another job.

    Returns:
        The exit code for the shell (`AGAIN`: start again), and a line for the log.

    Raises:
        UserError: it would start again, and has done so too often without getting further.
    """
    found, line = _judge(run, code, preempted)
    if found == AGAIN:
        job = Job.read(run)
        _check_progress(job, attempts(run), step_reached(job.progress))
    return found, line


def _judge(run: Path, code: int, preempted: bool) -> tuple[int, str]:
    said = outcomes(run)
    if code == 0:
        return 0, "finished"
    if Job.read(run).cancelled:
        return 1 if code == AGAIN else code, "cancelled; not started again"  # a process may have ended with that code
    if said and said[0].kind == "mistake":
        return USER_ERROR, "stopped by a mistake that only you can mend (the message is above); not started again"
    first = said[0] if said else None
    if first is not None and first.kind == "stopped":
        code = int(first.detail)
    if code == 128 + signal.SIGUSR1:  # saved, or ended at once where there was nothing to save yet
        return AGAIN, "told by Slurm that its time ends; starts again"
    if preempted:
        return AGAIN, "its nodes are taken for another job; starts again"
    if first is not None and first.kind == "stopped":
        return code, f"stopped by {signal.Signals(code - 128).name} and saved, as scancel asks; not started again"
    return AGAIN, f"srun ended with code {code} ({_why(code, first)}); starts again"


def _why(code: int, first: Outcome | None) -> str:
    if first is None or not first.detail:
        return MEANINGS.get(code, "a process or a node died")
    said = f"{first.kind}: {first.detail.splitlines()[0][:200]}"
    if match := re.fullmatch(r"exit code (\d+)", first.detail):
        said = ", ".join([said, *(text for number, text in MEANINGS.items() if number == int(match[1]))])
    return said


def follow(run: Path, number: str, environment: Mapping[str, str]) -> str:
    """Note that job ``number``, as `sbatch --parsable` gave it, goes on with the run. Returns a line for the log."""
    number = number.partition(";")[0]
    if "SLURM_ARRAY_TASK_ID" in environment:
        number += f"_{environment['SLURM_ARRAY_TASK_ID']}"
    replace(Job.read(run), number=number).write(run)
    return f"job {number} goes on"


def preempted(number: str) -> bool:
    """Whether Slurm is taking this job's nodes away for a job that is more urgent."""
    try:
        shown = subprocess.run(["scontrol", "-o", "show", "job", number], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    times = [word.partition("=")[2] for word in shown.stdout.split() if word.startswith("PreemptTime=")]
    return bool(times) and times[0] not in ("None", "Unknown")


def main(words: list[str]) -> int:
    """The commands above."""
    run, code = Path(words[1]), 0
    try:
        if words[0] == "begin":
            line = begin(run, os.environ)
            print()  # a log holds many starts
        elif words[0] == "follow":
            line = follow(run, words[2], os.environ)
        else:
            code, line = end(run, int(words[2]), preempted=preempted(os.environ["SLURM_JOB_ID"]))
    except UserError as error:
        code, line = USER_ERROR, str(error)
        note_outcome(run, "mistake", line)  # `submit status` shows it
    print(f"vit_efficient: {line}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
