"""What a run's folder knows of its Slurm job: ``RUN/slurm``.

    job.sh         the script; `sbatch RUN/slurm/job.sh` goes on with the run at any time
    recipe.yaml    the recipe as it was submitted: later changes of the file do not reach a waiting job
    job.json       the `Job` below
    attempts       a JSON line for every start
    outcomes/N     how process N of the last start ended, if it could say so
    output.log     what the job printed, all starts one after the other

Read and written in the job's own shell too, perhaps by a bare Python, so only the standard library is used here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from vit_efficient.errors import UserError

FOLDER = "slurm"
VARIABLE = "VIT_EFFICIENT_JOB"  # tells the processes of a job where this folder is
# Exit codes of a process that was asked to stop, and saved.
STOPPED = tuple(128 + int(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))
_STEP = re.compile(r"step-(\d+)")
# How a process can end, what decides first: srun ends the others with a signal, which they may take for a wish to stop.
KINDS = ("mistake", "fault", "stopped", "done")
# What a process says that ended because of another one: SIGTERM, which srun sends, or a code without an error.
_FOLLOWING = re.compile(rf"{128 + signal.SIGTERM}|exit code \d+")
T = TypeVar("T")


def folder(run: Path) -> Path:
    """``RUN/slurm``."""
    return run / FOLDER


@dataclass(frozen=True)
class Job:
    """A run's job.

    Args:
        number: Slurm's job number, ``17_3`` for a task of an array; empty until there is one.
        name: what the queue shows.
        log: absolute path of what the job prints.
        submitted: seconds since 1970.
        progress: folders whose checkpoints show that the run gets further: its own, and its base's where it trains one.
        restarts: starts without progress in a row, after which it stops.
        again: the command that goes on with it by hand.
        cancelled: whether `submit cancel` was asked for.
    """

    number: str
    name: str
    log: str
    submitted: float
    progress: tuple[str, ...]
    restarts: int
    again: str
    cancelled: bool = False

    def write(self, run: Path) -> None:
        """Put it into the run's folder, whole or not at all."""
        write_whole(folder(run) / "job.json", json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, run: Path) -> Job:
        """The job of a run's folder.

        Raises:
            UserError: there is none.
        """
        file = folder(run) / "job.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**values, "progress": tuple(values["progress"])})
        except FileNotFoundError:
            raise UserError(
                f"{run} was not submitted to Slurm: there is no {file}.\n"
                "  `python -m vit_efficient.submit status` lists the runs that were."
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file} cannot be read: {error}") from None


@dataclass(frozen=True)
class Attempt:
    """One start of a job: when (seconds since 1970), which job, where, and the step that it went on from."""

    time: float
    number: str
    nodes: str
    step: int


def attempts(run: Path) -> list[Attempt]:
    """All starts of a run's job, the first one first."""
    file = folder(run) / "attempts"
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [attempt for line in lines if (attempt := _read(Attempt, line)) is not None]


def add_attempt(run: Path, attempt: Attempt) -> None:
    """Note a start."""
    with open(folder(run) / "attempts", "ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read() not in (b"", b"\n")  # a full disk has cut the last line: this one is not to be lost with it
        file.write(b"\n" * torn + json.dumps(asdict(attempt)).encode() + b"\n")


def _read(kind: type[T], text: str) -> T | None:
    """A record out of its JSON; None where that was cut off: to know one thing less is better than to stop."""
    try:
        return kind(**json.loads(text))
    except (ValueError, TypeError):
        return None


def step_reached(folders: tuple[str, ...]) -> int:
    """Optimizer steps in the newest checkpoints of run folders, summed; 0 where there are none."""
    return sum(
        max((int(m[1]) for p in (Path(run) / "checkpoints").glob("step-*") if (m := _STEP.match(p.name))), default=0)
        for run in folders
    )


@dataclass(frozen=True)
class Outcome:
    """How a process ended: ``done``, ``mistake`` (told to the user), ``stopped`` (by a signal, saved) or ``fault``.

    `time` is for people: the clocks of two nodes differ by more than the ends of two processes.
    """

    time: float
    kind: str
    detail: str


def outcomes(run: Path) -> list[Outcome]:
    """Of the last start: by kind, the one that decides first; of a kind, what tells why before what followed."""
    files = sorted((folder(run) / "outcomes").glob("[0-9]*"), key=lambda file: (len(file.name), file.name))
    found = [outcome for file in files if (outcome := _read(Outcome, file.read_text("utf-8"))) is not None]
    return sorted(found, key=lambda one: (KINDS.index(one.kind), _FOLLOWING.fullmatch(one.detail) is not None))


def note_outcome(run: Path, kind: str, detail: str, process: str = "0") -> None:
    """Put down an `Outcome` of this moment."""
    text = json.dumps(asdict(Outcome(time.time(), kind, detail)))
    write_whole(folder(run) / "outcomes" / process, text)


def clear_outcomes(run: Path) -> None:
    """Forget those of the start before."""
    for file in (folder(run) / "outcomes").glob("*"):
        file.unlink(missing_ok=True)


@contextmanager
def outcome_noted(environment: dict[str, str] | os._Environ[str] = os.environ) -> Iterator[None]:
    """Note how a process of a Slurm job ends; whatever ended it goes on its way. Elsewhere this does nothing.

    `srun` gives one exit code for all processes, and when one fails it ends the others, which hides why.
    """
    kind, detail = "done", ""
    try:
        yield
    except UserError as error:
        kind, detail = "mistake", str(error)
        raise
    except SystemExit as error:
        kind, detail = ("done", "") if not error.code else ("fault", f"exit code {error.code}")
        if error.code in STOPPED:
            kind, detail = "stopped", str(error.code)
        raise
    except BaseException as error:
        kind, detail = "fault", f"{type(error).__name__}: {error}"
        raise
    finally:
        if environment.get(VARIABLE):
            note_outcome(Path(environment[VARIABLE]).parent, kind, detail, environment.get("SLURM_PROCID", "0"))


def write_whole(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def submitted_runs(roots: tuple[Path, ...]) -> list[Path]:
    """Runs with a job in folders of runs, or in folders of such folders (a study's), or these folders themselves."""
    found: dict[Path, Any] = {}
    for root in roots:
        for pattern in ("", "*/", "*/*/"):
            found |= {file.parents[1]: None for file in sorted(root.glob(f"{pattern}{FOLDER}/job.json"))}
    return list(found)
