"""A run's folder: made once, never overwritten, found again for resuming."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vit_efficient.cluster.record import FOLDER as JOB
from vit_efficient.engine.checkpoint import atomic_write, newest_checkpoint
from vit_efficient.engine.integrity import newest_whole
from vit_efficient.engine.lock import LOCK
from vit_efficient.engine.resume import differences
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.machine import detect_launch, process_started, rank
from vit_efficient.parallel.aside import aside, remove
from vit_efficient.parallel.folder import is_folder
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

ROOT = Path("runs")
TIME = "%Y%m%d-%H%M%S"
CHOSEN = "VIT_EFFICIENT_RUN"  # environment: the folder that rank 0 has chosen
RECIPE, METRICS, ENVIRONMENT, MODEL = "recipe.yaml", "metrics.json", "environment.json", "model.safetensors"


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN becomes null: JSON has no NaN."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, atomically."""
    atomic_write(path, lambda temporary: _put(temporary, text))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and value != value:
        return None
    return value


class RunDir:
    """The folder of one run and the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.recipe = path / RECIPE
        self.metrics = path / METRICS
        self.environment = path / ENVIRONMENT
        self.model = path / MODEL

    @property
    def finished(self) -> bool:
        return self.metrics.is_file()

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint, by its name; whether it can be read is not looked at."""
        return newest_checkpoint(self.checkpoints)

    def whole_checkpoint(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose bytes are as they were written, or None where there is none at all.

        Args:
            say: is told of each newer one that is damaged.

        Raises:
            CheckpointError: there are some, and all of them are damaged.
        """
        found, refused = newest_whole(self.checkpoints)
        for line in refused:
            say(f"{line}; going back to {found}")
        return found

    @property
    def begun(self) -> bool:
        """Whether this is the folder of a run that ended before its first checkpoint: nothing in it can be lost.

        So is the folder of a run that was submitted to Slurm and did not start yet.
        """
        own = {RECIPE, ENVIRONMENT, "checkpoints", "tensorboard", "stacks", LOCK, JOB}
        if not (self.recipe.is_file() or (self.path / JOB).is_dir()) or {p.name for p in self.path.iterdir()} - own:
            return False
        return self.last_checkpoint() is None

    def check_new(self, *, again: bool = False) -> None:
        """See that no run would be overwritten.

        Args:
            again: whether a run that ended before its first checkpoint may begin again here.

        Raises:
            UserError: a run is there already.
        """
        if not self.path.exists() or (self.path.is_dir() and not {p.name for p in self.path.iterdir()} - {LOCK}):
            return
        if again and self.begun:
            return
        raise UserError(
            f"{self.path} already exists, and a run is never overwritten.\n"
            f"  Continue it with `--resume {self.path}`, or choose another `run.dir`."
        )

    def create(self) -> None:
        """Make the folder; what a killed run had half written is cleared away, what it had set aside put back.

        Raises:
            UserError: it cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for old, path in aside(self.checkpoints):
                os.rename(old, path)
            for half in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
                remove(half)
        except OSError as error:
            raise UserError(f"Cannot make the run folder {self.path}: {error}. Set `run.dir` to another.") from error


def run_stem(variant: str, protocol: str) -> str:
    """What the names of all runs of a variant under a protocol begin with."""
    return f"{variant or 'run'}-{Path(protocol).stem or 'protocol'}"


def stamp() -> str:
    """What tells runs apart: the time, or, where several processes must find the same name, what they share.

    Processes that Lightning starts inherit it through the environment. Those that torchrun starts share its id, if
    anybody gave it one, or else the process that started them; those of Slurm a job, and a step of it.
    """
    launch, elastic = detect_launch(), os.environ.get("TORCHELASTIC_RUN_ID", "none")
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID", "0")
    if elastic != "none":
        return elastic
    if job:
        return f"{job}.{step}" if launch is not None and launch.by == "srun" and step != "0" else job
    began = process_started(os.getppid()) if launch is not None else None
    if began is not None:
        return time.strftime(TIME, time.localtime(began))
    return os.environ.setdefault("VIT_EFFICIENT_STAMP", time.strftime(TIME))


def new_path(variant: str, protocol: str, root: Path = ROOT) -> Path:
    """``runs/<recipe>-<protocol>-<time>``, the same for all ranks, and of a process that is alone a free one.

    There, a counter stands behind it where two runs begin in one second, and what rank 0 finds is what the processes
    get that Lightning starts afterwards, when the folder is there. Those of Slurm or torchrun look for a name at the
    same time as others make it: they take it as it is, and rank 0 refuses one that is there already.
    """
    path = root / f"{run_stem(variant, protocol)}-{stamp()}"
    if detect_launch() is not None:
        return path
    if rank() > 0 and CHOSEN in os.environ:
        return Path(os.environ[CHOSEN])
    stem, count = path.name, 1
    while path.exists():
        count += 1
        path = root / f"{stem}-{count}"
    os.environ[CHOSEN] = str(path)
    return path


def locate(target: str) -> tuple[RunDir, Path]:
    """The run and the checkpoint that ``--resume PATH`` means: a run's folder or one of its checkpoints.

    Raises:
        CheckpointError: nothing there, or nothing to resume in it.
    """
    path = Path(target)
    if path.is_file() or is_folder(path):
        if path.parent.name != "checkpoints":
            raise CheckpointError(
                f"{path} does not lie in a run's `checkpoints` folder, so the rest of its run is missing. "
                "Give the run's folder, or take only the weights with `model.weights=`."
            )
        return RunDir(path.parent.parent), path
    if not path.is_dir():
        raise CheckpointError(f"--resume {target}: there is no such run folder or checkpoint.")
    run = RunDir(path)
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        again = ""
        if run.begun:
            words = ["python", "-m", "vit_efficient.fit", "--recipe", str(run.recipe), f"run.dir={path}"]
            again = f" Begin it again:\n  {shlex.join([*words, '--resume', 'auto'])}"
        raise CheckpointError(f"--resume {target}: no checkpoint in {run.checkpoints}; nothing was saved there.{again}")
    return run, checkpoint


def find_unfinished(recipe: Recipe, root: Path = ROOT, say: Callable[[str], None] = lambda line: None) -> RunDir | None:
    """The run of the same recipe that began last, of those that have a checkpoint and no metrics yet.

    Their names do not tell: some end in a time, others in a job's number. `recipe.yaml` is written once, at the start.

    Args:
        recipe: resolved.
        root: where runs are.
        say: is told of each unfinished run whose recipe cannot be read any more.
    """
    runs = [RunDir(p.parent) for p in root.glob(f"{run_stem(recipe.variant, recipe.protocol)}-*/{RECIPE}")]
    for run in sorted(runs, key=lambda r: (r.recipe.stat().st_mtime_ns, r.path.name), reverse=True):
        checkpoint = run.last_checkpoint()
        if run.finished or checkpoint is None:
            continue
        try:
            saved = load_recipe(str(run.recipe)).recipe.model_dump(mode="json")
        except UserError as error:
            say(f"{run.recipe} cannot be read, and the run is passed over: {str(error).splitlines()[0]}")
            continue
        if not differences(saved, recipe.model_dump(mode="json")):
            return run
    return None
