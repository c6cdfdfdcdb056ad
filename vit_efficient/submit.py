"""Train on a Slurm cluster.

python -m vit_efficient.submit --recipe R --nodes N --gpus-per-node G --time T [--site site.yaml] [key=value ...]
python -m vit_efficient.submit status [RUN ...] | logs [-f] RUN | cancel RUN ...
python -m vit_efficient.submit --estimate --recipe R --gpu h200 [--gpus 1,2,8 | --nodes N --gpus-per-node G] [key=value]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.syntax import Syntax

from vit_efficient.cli import Parser, base_parser, run_command
from vit_efficient.cluster import runs, slurm
from vit_efficient.cluster.record import Job, folder, write_whole
from vit_efficient.cluster.script import Request, Script, check_request, read_time
from vit_efficient.cluster.site import read_site
from vit_efficient.errors import Problem, RecipeError, UserError

if TYPE_CHECKING:  # what looks after runs needs neither torch nor the seconds that importing it takes
    from vit_efficient.engine.submission import Planned

# The models that the founding study compares.
STUDY = ("fp32_sdpa", "int8_sdpa", "int8_flash2", "int4_sdpa", "int4_flash2")


def parser() -> argparse.ArgumentParser:
    """The command line that submits."""
    words = base_parser(
        "submit",
        "Write a job script for Slurm, show it, submit it, and say where to look. "
        "`submit status`, `submit logs -f RUN` and `submit cancel RUN` look after submitted runs.",
        several=True,
        required=False,
    )
    words.add_argument("--nodes", type=_positive, default=1, metavar="N", help="machines (1)")
    words.add_argument(
        "--gpus-per-node", type=_natural, default=1, metavar="G", help="one process each (1); 0 trains on CPUs"
    )
    words.add_argument("--tasks-per-node", type=_positive, metavar="P", help="processes on a node, with 0 GPUs (1)")
    words.add_argument("--time", required=True, metavar="T", help="limit of one start: 12h, 90m, 2-12:00:00")
    words.add_argument("--site", type=Path, metavar="FILE", help="what differs between clusters (./site.yaml)")
    words.add_argument(
        "--array",
        choices=("variants", "recipes"),
        help=f"a job array, each run its own folder. variants: the study's five ({', '.join(STUDY)}) "
        "and every --recipe; recipes: every --recipe",
    )
    words.add_argument("--dry-run", action="store_true", help="check and show the script; needs no Slurm")
    words.add_argument(
        "--estimate",
        action="store_true",
        help="predict hours, memory and GPU-hours on 1 to 1,024 GPUs instead: `submit --estimate --help`",
    )
    return words


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def submit(options: argparse.Namespace, console: Console) -> None:
    """Run the command that submits."""
    from vit_efficient.engine.submission import plan

    site, site_file, problems = read_site(options.site)
    names = list(dict.fromkeys([*(options.recipe or []), *(STUDY if options.array == "variants" else [])]))
    if not names:
        problems.append(Problem("--recipe", "is missing: the name of a variant (int8_sdpa) or a file"))
    if len(names) > 1 and options.array is None:
        problems.append(Problem("--recipe", "is given more than once", suggestion="--array recipes"))
    seconds = 2 * site.warn_seconds
    try:
        seconds = read_time(options.time)
    except ValueError as error:
        problems.append(Problem("--time", str(error)))
    request = Request.of(
        site, nodes=options.nodes, gpus=options.gpus_per_node, tasks=options.tasks_per_node, seconds=seconds
    )
    problems += check_request(request, site)
    planned: list[Planned] = []
    home = Path()
    try:
        if names:
            planned, home = plan(names, options.overrides, request, site)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise UserError(_mistakes(problems))
    first = planned[0].recipe
    title = f"{', '.join(one.recipe.variant for one in planned)} on {first.protocol}"
    name = f"{first.variant if len(planned) == 1 else 'study'}-{Path(first.protocol).stem}"
    script = Script(name, title, request, site, site_file, tuple(one.run for one in planned), home, Path.cwd())
    console.print(Syntax("", "bash").highlight(script.render()), soft_wrap=True)
    for line in _notes(planned):
        console.print(f"[bold]{'note':>13}[/]  {line}", soft_wrap=True)
    if options.dry_run:
        _tell(console, script, "none: with --dry-run nothing is written or submitted")
        return
    numbers = _hand_over(planned, script)
    _tell(console, script, f"[bold green]{' and '.join(numbers)}[/] in the queue, as {name}")
    where = runs.short(home)
    console.print(
        f"\npython -m vit_efficient.submit status {where}\n"
        f"python -m vit_efficient.submit logs -f {runs.short(script.runs[0])}\n"
        f"python -m vit_efficient.submit cancel {where}",
        soft_wrap=True,
    )


def _notes(planned: Sequence[Planned]) -> list[str]:
    """What is to be said of the runs' memory, once where it is the same of all."""
    notes = {one.note for one in planned}
    if len(notes) == 1:
        return [note for note in notes if note]
    return [f"{one.recipe.variant}: {one.note}" for one in planned]


def _mistakes(problems: Sequence[Problem]) -> str:
    count = len(problems)
    head = f"{count} mistake{'s' * (count != 1)}; nothing was submitted\n"
    return head + "\n".join(f"  {problem}" for problem in problems)


def _hand_over(planned: Sequence[Planned], script: Script) -> list[str]:
    """Write all that the job needs, and submit it; all of it is taken back where Slurm refuses a part.

    Returns:
        Job numbers: one, or two where some runs of an array begin after another one.

    Raises:
        UserError: refused by Slurm, or by the file system; what of it is left is said.
    """
    from vit_efficient.engine.submission import unusable
    from vit_efficient.recipe.load import dump_recipe

    slurm.require()
    numbers: dict[int, str] = {}  # Slurm's, by the run's index
    try:
        for index, one in enumerate(planned):
            write_whole(folder(one.run) / "recipe.yaml", dump_recipe(one.recipe))
            log, again = str(script.log(index)), script.again(index)
            Job("", script.name, log, time.time(), one.progress, script.site.restarts, again).write(one.run)
        write_whole(script.path, script.render())
        if not script.array:
            numbers[0] = slurm.submit(script.path)
        else:
            _submit_array(planned, script, numbers)
        _note_numbers(planned, numbers)
    except (UserError, OSError) as error:
        said = str(unusable(script.home, error) if isinstance(error, OSError) else error)
        left = _undo(planned, script, numbers)
        raise UserError(f"{said.removesuffix(slurm.NOTHING)}\n{left}" if left else said) from error
    return _jobs(numbers)


def _jobs(numbers: Mapping[int, str]) -> list[str]:
    """Without the tasks of an array."""
    return list(dict.fromkeys(number.partition("_")[0] for number in numbers.values()))


def _note_numbers(planned: Sequence[Planned], numbers: Mapping[int, str]) -> None:
    for index, number in numbers.items():
        replace(Job.read(planned[index].run), number=number).write(planned[index].run)


def _undo(planned: Sequence[Planned], script: Script, numbers: Mapping[int, str]) -> str:
    """Cancel what is in the queue already, and remove what was written, unless a job is left that needs it.

    Returns:
        What is to be said of the jobs; nothing where there were none.
    """
    jobs, left, why = _jobs(numbers), [], ""
    for job in jobs:
        try:
            slurm.cancel(job)
        except UserError as error:
            left.append(job)
            why = str(error)
    if left:
        with suppress(UserError, OSError):  # so that `submit cancel` finds them
            _note_numbers(planned, numbers)
        return (
            f"  Submitted before that and still in the queue: {' and '.join(left)}. {why}\n"
            f"  Its folder is kept. Cancel it yourself: scancel {' '.join(left)}; then remove {script.home}."
        )
    for path in (*(one.run for one in planned), script.home):
        _take_back(path)
    return f"  Submitted before that, and cancelled again: {' and '.join(jobs)}." if jobs else ""


def _submit_array(planned: Sequence[Planned], script: Script, numbers: dict[int, str]) -> None:
    """Adds Slurm's numbers by index, those of a job as soon as it is submitted."""
    later = [index for index, one in enumerate(planned) if one.after_base]
    now = [index for index in range(len(planned)) if index not in later]
    job = slurm.submit(script.path, f"--array={','.join(map(str, now))}")
    numbers |= {index: f"{job}_{index}" for index in now}
    if later:
        base = next(index for index in now if planned[index].is_base)
        wait = (f"--dependency=afterok:{job}_{base}", "--kill-on-invalid-dep=yes")
        job = slurm.submit(script.path, f"--array={','.join(map(str, later))}", *wait)
        numbers |= {index: f"{job}_{index}" for index in later}


def _take_back(home: Path) -> None:
    shutil.rmtree(folder(home), ignore_errors=True)
    with suppress(OSError):  # why it could not be made is what is told
        if home.is_dir() and not any(home.iterdir()):
            home.rmdir()


def _tell(console: Console, script: Script, what: str) -> None:
    rows = [("job", what), ("run" if not script.array else "study", str(script.home))]
    rows += [("script", str(script.path)), ("log", str(script.log()) if not script.array else "a log for each run")]
    for label, text in rows:
        console.print(f"[bold]{label:>13}[/]  {text}", soft_wrap=True)


def look_after(command: str, argv: Sequence[str], console: Console) -> None:
    """`status`, `logs` and `cancel`."""
    about = {
        "status": "Where submitted runs stand.",
        "logs": "What a run's job has printed.",
        "cancel": "Cancel the jobs of runs: each saves and ends. What it has so far stays.",
    }[command]
    words = Parser(prog=f"python -m vit_efficient.submit {command}", description=about, allow_abbrev=False)
    words.add_argument(
        "runs",
        nargs="*" if command == "status" else "+",
        type=Path,
        metavar="RUN",
        help="a run's folder, or a folder of runs",
    )
    if command == "logs":
        words.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    if command == "status":
        words.add_argument("--site", type=Path, metavar="FILE", help="says where runs are, if no RUN is given")
    options = words.parse_intermixed_args(argv)
    site, _, problems = read_site(getattr(options, "site", None))
    if problems:
        raise UserError(_mistakes(problems))
    found = runs.find(options.runs, site.runs or Path("runs"))
    if command == "status":
        console.print(runs.table(runs.status_of(found)))
    elif command == "cancel":
        runs.cancel(found, console)
    elif len(found) > 1:
        listed = "\n".join(f"    {runs.short(run)}" for run in found)
        raise UserError(f"{options.runs[0]} holds several runs; name one:\n{listed}")
    else:
        runs.follow(found[0], console, on=options.follow)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can mend."""
    words = list(sys.argv[1:] if argv is None else argv)
    console = Console(highlight=False)
    if words and words[0] in ("status", "logs", "cancel"):
        look_after(words[0], words[1:], console)
    elif "--estimate" in words:
        from vit_efficient.engine.trainer import quiet

        quiet()  # before libraries are imported that talk while they are
        from vit_efficient.measure import estimate

        estimate.main(words)
    else:
        submit(parser().parse_intermixed_args(words), console)


if __name__ == "__main__":
    run_command(main)
