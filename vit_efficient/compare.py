"""Hold finished runs against each other: the table of a study.

python -m vit_efficient.compare runs/fp32_sdpa-* runs/int8_sdpa-*
python -m vit_efficient.compare runs --baseline fp32_sdpa --output study.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vit_efficient.cli import Parser, output_file, run_command
from vit_efficient.errors import UserError

if TYPE_CHECKING:
    from vit_efficient.engine.rundir import RunDir
    from vit_efficient.measure.comparison import Run

WIDE = 200  # columns where the output is a file: lines are not broken there


def parser() -> Parser:
    """The command line of `compare`."""
    words = Parser(
        prog="python -m vit_efficient.compare",
        description="Hold finished runs of several variants and seeds against each other, under one protocol.",
        allow_abbrev=False,
    )
    words.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    words.add_argument("--baseline", metavar="VARIANT", help="what the others are held against (default: plain fp32)")
    words.add_argument(
        "--across-protocols", action="store_true", help="compare runs whose model, data, augment or optim differ"
    )
    words.add_argument("--output", type=output_file, metavar="FILE.json", help="write the figures to this file")
    return words


def find_runs(paths: Sequence[Path]) -> tuple[list[RunDir], list[RunDir]]:
    """The runs that paths mean, each once: finished ones, and others.

    Raises:
        UserError: a path is neither a run nor a folder of runs.
    """
    from vit_efficient.engine.rundir import RECIPE, RunDir

    found: dict[Path, RunDir] = {}
    for path in paths:
        inside = [path] if (path / RECIPE).is_file() else sorted(file.parent for file in path.glob(f"*/{RECIPE}"))
        if not inside:
            raise UserError(f"{path} is not a run, nor a folder of runs: no {RECIPE} in it or one level below.")
        for folder in inside:
            found.setdefault(folder.resolve(), RunDir(folder))
    runs = list(found.values())
    return [run for run in runs if run.finished], [run for run in runs if not run.finished]


def read_run(folder: RunDir) -> Run:
    """A finished run.

    Raises:
        UserError: its recipe or its figures cannot be read, or its top-1 is no number.
    """
    from vit_efficient.measure.comparison import NEEDED, Run
    from vit_efficient.recipe.load import load_recipe

    metrics = _read_json(folder.metrics)
    missing = [key for key in NEEDED if key not in metrics]
    if missing:
        raise UserError(
            f"{folder.metrics} lacks {', '.join(missing)}: it is not what `fit` wrote, or an older version did. "
            "Leave that run out."
        )
    if metrics["top1"] is None:
        raise UserError(f"{folder.metrics}: top1 is not a number; the run diverged. Leave it out.")
    environment = _read_json(folder.environment) if folder.environment.is_file() else {}
    return Run(folder.path, load_recipe(str(folder.recipe)).recipe, metrics, environment)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a mapping of figures.")
    return value


def compare(options: argparse.Namespace, console: Console) -> None:
    """Run the command."""
    from vit_efficient.engine.rundir import write_json
    from vit_efficient.measure.comparison import find_baseline, group_runs
    from vit_efficient.measure.comparison_table import as_plain, notes, print_comparison

    finished, unfinished = find_runs(options.runs)
    if not finished:
        raise UserError(
            "None of these runs is finished:\n"
            + "\n".join(f"    {run.path}" for run in unfinished)
            + f"\n  Go on with one: python -m vit_efficient.fit --resume {unfinished[0].path}"
        )
    groups = group_runs([read_run(run) for run in finished], across_protocols=options.across_protocols)
    baseline = find_baseline(groups, options.baseline)
    groups.sort(key=lambda group: group is not baseline)  # it comes first, the others stay in order
    print_comparison(console, groups, baseline)
    for line in notes(groups, baseline):
        console.print(line, soft_wrap=True)
    for run in unfinished:
        console.print(f"[bold]unfinished[/]  {run.path}, left out", soft_wrap=True)
    if options.output is not None:
        figures = as_plain(groups, baseline) | {"unfinished": [str(run.path) for run in unfinished]}
        write_json(options.output, figures)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; raises UserError for what the user can mend."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(console.width, WIDE))
    compare(parser().parse_args(argv), console)


if __name__ == "__main__":
    run_command(main)
