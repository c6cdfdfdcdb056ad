"""Train a variant under a protocol.

python -m vit_efficient.fit --recipe recipes/int8_sdpa.yaml [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from vit_efficient.cli import base_parser, output_file, run_command
from vit_efficient.cluster.early import StoppedOutside, stop_at_once
from vit_efficient.cluster.record import outcome_noted
from vit_efficient.errors import RecipeError, UserError
from vit_efficient.machine import Machine, detect, rank
from vit_efficient.recipe.compat import caveats, check, resolve
from vit_efficient.recipe.elsewhere import move
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

if TYPE_CHECKING:
    from vit_efficient.engine.rundir import RunDir


def parser() -> argparse.ArgumentParser:
    """The command line of `fit`."""
    words = base_parser(
        "fit", "Train a variant under a protocol, evaluate what it would ship, and keep it all.", required=False
    )
    words.add_argument(
        "--dry-run", action="store_true", help="show the resolved recipe, sizes and memory; train nothing"
    )
    words.add_argument(
        "--resume",
        default="none",
        metavar="none|auto|PATH",
        help="none: a new run; auto: go on with the newest unfinished run of this recipe, or begin one; "
        "PATH: go on with that run or checkpoint",
    )
    words.add_argument("--output", type=output_file, metavar="FILE.json", help="write the figures to this file too")
    return words


def load(options: argparse.Namespace, machine: Machine, console: Console) -> Recipe:
    """The resolved recipe of a command line; its notes are printed.

    Raises:
        RecipeError: every mistake in it.
    """
    name = options.recipe
    of_run = name is None and options.resume not in ("none", "auto")
    if of_run:
        from vit_efficient.engine.rundir import locate

        name = str(locate(options.resume)[0].recipe)
    if name is None:
        raise UserError("fit needs `--recipe R`: the name of a variant (int8_sdpa) or a file.")
    loaded = load_recipe(name, options.overrides)
    here, moved = move(loaded, machine) if of_run else (loaded.recipe, [])
    settled, tried = _settled(here, machine)
    recipe, notes = resolve(settled, machine)
    for note in [*loaded.notes, *moved, *tried, *notes]:
        console.print(f"[bold]{'resolved':>13}[/]  {note}", soft_wrap=True)
    return recipe


def _settled(recipe: Recipe, machine: Machine) -> tuple[Recipe, list[str]]:
    """`strategy: auto` by the GPUs' memory; where there is none, nothing heavy is imported for it."""
    if recipe.strategy.name != "auto" or not machine.gpus:
        return recipe, []
    from vit_efficient.engine.settle import settle_strategy

    return settle_strategy(recipe, machine)


def place(recipe: Recipe, resume: str, console: Console) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from (None: a new run).

    A damaged checkpoint is passed over for the one before, which is said; not one that was named.

    Raises:
        CheckpointError: nothing to resume at the path given, or all of it damaged.
    """
    from vit_efficient.engine.rundir import RunDir, find_unfinished, locate, new_path

    def say(line: str) -> None:
        console.print(f"[bold]{'damaged':>13}[/]  {line}", soft_wrap=True)

    if resume not in ("none", "auto"):
        run, checkpoint = locate(resume)
        return run.path, checkpoint if Path(resume) == checkpoint else run.whole_checkpoint(say)
    if recipe.run.dir is not None:
        run = RunDir(recipe.run.dir)
        return run.path, run.whole_checkpoint(say) if resume == "auto" else None
    if resume == "auto":
        found = find_unfinished(recipe, say=say)
        if found is not None:
            return found.path, found.whole_checkpoint(say)
    return new_path(recipe.variant, recipe.protocol), None


def fit(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    machine = detect()
    recipe = load(options, machine, console)
    problems = check(recipe, machine, trains=True)
    if options.dry_run:
        from vit_efficient.engine.dry import dry_run

        dry_run(recipe, machine, problems, console)
        return
    if problems:
        raise RecipeError(problems)

    from vit_efficient.engine.lock import RunLock
    from vit_efficient.engine.rundir import RunDir
    from vit_efficient.measure.table import print_result

    for line in caveats(recipe, machine):
        console.print(f"[bold]{'note':>13}[/]  {line}", soft_wrap=True)
    path, checkpoint = place(recipe, options.resume, console)
    run = RunDir(path)
    title = f"{recipe.variant} on {recipe.protocol}"
    if run.finished and options.resume != "none":
        console.print(f"{run.path} is finished already; its figures:")
        say_differences(run, recipe, console)
        print_result(console, title, json.loads(run.metrics.read_text(encoding="utf-8")))
        return
    if checkpoint is None:
        from vit_efficient.engine.base import check_given

        check_given(recipe)  # before a folder is made
        if rank() == 0:  # the others may find the folder that rank 0 has just made
            run.check_new(again=options.resume == "auto")
        if options.resume == "auto":
            console.print(f"[bold]{'resume':>13}[/]  nothing to go on from: a new run begins")
    else:
        console.print(f"[bold]{'resume':>13}[/]  {checkpoint}")
    with RunLock(run.path, held=rank() == 0) as lock:
        if lock.unsupported is not None:
            console.print(f"[bold]{'note':>13}[/]  {lock.unsupported}", soft_wrap=True)
        if checkpoint is None and rank() == 0:  # another job may have been here a moment ago
            run.check_new(again=options.resume == "auto")
        train_in(run, checkpoint, recipe, machine, options, console)


def say_differences(run: RunDir, recipe: Recipe, console: Console) -> None:
    """Say where a finished run's recipe is not the one that was asked for: its figures are of the run's own."""
    from vit_efficient.engine.resume import differences

    saved = load_recipe(str(run.recipe)).recipe.model_dump(mode="json")
    rows = differences(saved, recipe.model_dump(mode="json"))
    if rows:
        lines = "".join(f"\n    {escape(row)}" for row in rows)
        console.print(
            f"[bold]{'note':>13}[/]  they are of another recipe than this command asks for, which was not trained:"
            f"{lines}\n  To train it, begin a new run: leave out `--resume`.",
            soft_wrap=True,
        )


def train_in(
    run: RunDir,
    checkpoint: Path | None,
    recipe: Recipe,
    machine: Machine,
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Train in a run's folder, which this process holds, and show what came of it.

    Args:
        run: the folder.
        checkpoint: to go on from, or None.
        recipe, machine, options, console: of the command.
    """
    from vit_efficient.engine.base import ensure_base, has_adapters
    from vit_efficient.engine.loop import StopRun
    from vit_efficient.engine.rundir import write_json
    from vit_efficient.engine.train import train
    from vit_efficient.measure.table import print_result
    from vit_efficient.model.distill import find_teacher

    title = f"{recipe.variant} on {recipe.protocol}"
    find_teacher(recipe)  # before a base is trained for it
    try:
        base = ensure_base(recipe, machine, console) if has_adapters(recipe) else None
        console.print(f"[bold]{'run':>13}[/]  {run.path}")
        result = train(recipe, machine, run, console, base=base.weights if base else None, resume=checkpoint)
    except StopRun as stop:
        if rank() > 0 and machine.launch is None:
            return  # rank 0 reports; a child that ends with an error would make Lightning kill its parent
        again = shlex.join(["python", "-m", "vit_efficient.fit", "--resume", str(stop.checkpoint.parent.parent)])
        console.print(f"\nStopped by {stop.reason}; everything is saved in {stop.checkpoint}.\nGo on with:\n  {again}")
        number = getattr(signal, stop.reason, signal.SIGINT)
        sys.exit(128 + int(number))
    seconds = base.seconds if base else 0.0
    metrics = {**result.metrics, "base_seconds": seconds}
    print_result(console, title, metrics, seconds)
    console.print(
        f"run folder   {run.path}\nmodel file   {run.model}\nwatch it     tensorboard --logdir {run.path.parent}",
        soft_wrap=True,
    )
    if options.output is not None:
        write_json(options.output, metrics)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can mend."""
    options = parser().parse_intermixed_args(argv)
    with outcome_noted():
        try:
            with stop_at_once():
                fit(options, Console(quiet=rank() > 0, highlight=False))
        except StoppedOutside as stop:
            if rank() == 0:
                print(f"\nStopped by {stop.signal.name}. Nothing had to be saved; `--resume auto` goes on.", flush=True)
            sys.exit(128 + stop.signal)


if __name__ == "__main__":
    run_command(main)
