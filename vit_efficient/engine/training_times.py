"""`benchmark training`: optimizer steps as `fit` does them, on one device or several, held against each other."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vit_efficient.cli import Parser, above_zero, base_parser, output_file
from vit_efficient.cluster.early import StoppedOutside, stop_at_once
from vit_efficient.engine.contenders import load_entry
from vit_efficient.engine.entries import Entry
from vit_efficient.engine.rundir import write_json
from vit_efficient.engine.timed_process import Question, answer_file
from vit_efficient.engine.trainer import accumulate, quiet, world_size
from vit_efficient.errors import CapabilityError, UserError
from vit_efficient.machine import Machine, detect
from vit_efficient.measure.estimate import machine_of
from vit_efficient.measure.forecast import forecast
from vit_efficient.measure.gpus import kind_of
from vit_efficient.measure.known import classes_of
from vit_efficient.measure.layout import Layout
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.record import environment
from vit_efficient.measure.training_rows import GIB, TrainingRow, first_that_ran, print_rows
from vit_efficient.recipe.schema import Recipe

MODULE = "vit_efficient.engine.timed_process"
OURS = {  # keys that this command decides
    "data.batch_size": "--batch says how many images each device has in a step, whatever their number",
    "data.workers": "every step has the same batch, and nothing is loaded",
}
LINGER = 30.0  # seconds that the other processes of a run get to end once the first has
LINES = 6  # of what a run printed, shown where it died without an answer
EXAMPLES = """\
examples:
  benchmark training --recipe fp32_sdpa --recipe "fp32_sdpa strategy=ddp strategy.devices=2" --batch 64
                                                                      (the digits model; two processes)
  benchmark training --recipe "fp32_sdpa strategy=single" --recipe "fp32_sdpa strategy=ddp" \\
            --recipe "fp32_sdpa strategy=fsdp" --batch 128 protocol=imagenet_vit_l16 \\
            quantization.precision=bf16 strategy.compile=true --output figures.json
  benchmark training --recipe "int4_sdpa strategy.checkpointing=true" --batch 128 --memory 8 protocol=imagenet_vit_l16

Module, strategy, trainer and callbacks are those of `fit`; every step has the same batch of noise, so that no data is
loaded. Weights are random unless model.weights names some. Every run is processes of its own; the runs take turns.
The first recipe is what the others are held against. Other key=value words override every recipe; those in the
quotes of one --recipe override that one.
"""


@dataclass(frozen=True)
class Contender:
    """A recipe at a batch size, resolved, and what is known of it before it runs."""

    entry: Entry
    words: tuple[str, ...]
    recipe: Recipe
    row: TrainingRow


def parser() -> Parser:
    """The command line."""
    words = base_parser("benchmark training", "Time training steps as `fit` does them, on one device or several.",
                        several=True)  # fmt: skip
    words.formatter_class = argparse.RawDescriptionHelpFormatter
    words.epilog = EXAMPLES
    words.add_argument(
        "--batch", type=_numbers, default=(64,), metavar="B,B", help="images of each device in a step (default 64)"
    )
    words.add_argument("--steps", type=above_zero, default=25, metavar="N", help="measured in a run (default 25)")
    words.add_argument("--warm-up", type=above_zero, default=8, metavar="N", help="steps before them (default 8)")
    words.add_argument("--rounds", type=above_zero, default=2, metavar="N", help="runs of each, in turn (default 2)")
    words.add_argument("--memory", type=float, metavar="GIB", help="hold each process to so much of its GPU")
    words.add_argument("--output", type=output_file, metavar="FILE.json", help="write the figures to this file")
    return words


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(above_zero(part) for part in text.split(",")))


def main(arguments: Sequence[str], console: Console) -> None:
    """Run the command.

    Raises:
        UserError: what the user can mend; at the end, if a run failed, which.
    """
    options = parser().parse_intermixed_args(arguments)
    quiet()
    machine = detect()
    if machine.launch is not None:
        raise UserError(
            f"benchmark training starts its processes itself, and {machine.launch.by} has started several of it. "
            "Run it once, on one machine: strategy.devices says how many processes a recipe gets."
        )
    if options.memory is not None and not machine.gpus:
        raise UserError("--memory holds a process to a part of its GPU, and there is no GPU here.")
    entries = [Entry.of(word) for word in options.recipe if word.strip()]
    if not entries:
        raise UserError("There is nothing to measure: give `--recipe R` (repeatable).")
    asked = [prepare(entry, options.overrides, batch, machine) for batch in options.batch for entry in entries]
    conditions = environment(machine)

    def tell(text: str) -> None:
        console.print(Text(text, "dim"), soft_wrap=True)

    def keep(rows: Sequence[TrainingRow]) -> None:
        """After each run, so that what is cut short leaves what it measured."""
        if options.output is not None:
            plain = [row.plain(first_that_ran(rows, row.batch)) for row in rows]
            asked_for = {"steps": options.steps, "warm_up": options.warm_up, "memory_gib": options.memory}
            write_json(options.output, {**asked_for, "rows": plain, "environment": conditions})

    memory = None if options.memory is None else options.memory * GIB
    try:
        with stop_at_once():
            rows = measure(asked, options.rounds, options.steps, options.warm_up, memory, tell, keep)
    except StoppedOutside as stop:
        sys.exit(128 + stop.signal)
    where = machine.gpus[0].name if asked[0].recipe.strategy.accelerator == "gpu" else "CPU"
    print_rows(console, rows, f"{asked[0].recipe.model.name}, training, {where}")
    failed = [row for row in rows if row.failed is not None]
    if failed:
        lines = "\n".join(f"  {row.name}, batch {row.batch}: {row.failed}" for row in failed)
        raise UserError(f"{len(failed)} of {len(rows)} could not be measured. The other figures stand.\n{lines}")


def prepare(entry: Entry, overrides: Sequence[str], batch: int, machine: Machine) -> Contender:
    """A recipe whose global batch is `batch` images for each of its devices.

    Raises:
        UserError: it cannot run here, on one machine; its micro-batch does not divide the batch.
    """
    for word in (*overrides, *entry.words):
        if (why := OURS.get(word.partition("=")[0])) is not None:
            raise UserError(f"{word} has no place here: {why}.")
    common = (*overrides, "data.workers=0")  # nothing is loaded
    first = load_entry(entry, common, machine)
    world = world_size(first)
    micro = _micro_batch(entry, overrides)
    if micro is not None and batch % micro:
        raise UserError(f"{entry.title}: strategy.micro_batch {micro} does not divide --batch {batch}.")
    words = (*overrides, *entry.words, "data.workers=0", f"data.batch_size={batch * world}")
    recipe = load_entry(replace(entry, words=words), (), machine)
    row = TrainingRow(
        name=entry.title,
        how=_how(recipe),
        world=world,
        batch=batch,
        micro_batch=recipe.strategy.micro_batch or batch,
        words=(entry.source, *words),
    )
    return Contender(entry, words, recipe, _predicted(row, recipe, machine))


def _micro_batch(entry: Entry, overrides: Sequence[str]) -> int | None:
    """What a recipe says of its micro-batch before anything is resolved; None: nothing."""
    from vit_efficient.recipe.load import load_recipe

    return load_recipe(entry.source, [*overrides, *entry.words]).recipe.strategy.micro_batch


def _how(recipe: Recipe) -> str:
    parts = [str(Layout.of(recipe.strategy)), recipe.quantization.precision]
    parts += ["compiled"] if recipe.strategy.compile else ["eager"]
    parts += ["checkpointing"] if recipe.strategy.checkpointing else []
    if (count := accumulate(recipe)) > 1:
        parts.append(f"{count} x {recipe.strategy.micro_batch}")
    return ", ".join(parts)


def _predicted(row: TrainingRow, recipe: Recipe, machine: Machine) -> TrainingRow:
    """The row with what can be said of memory and, on a known GPU, of speed before it runs."""
    if recipe.strategy.accelerator != "gpu":
        return row
    plan, layout = Plan(recipe, classes_of(recipe)), Layout.of(recipe.strategy)
    kind = kind_of(machine.gpus[0].name)
    try:
        needed = plan.estimate(
            layout, row.micro_batch, checkpointing=recipe.strategy.checkpointing, accumulate=accumulate(recipe)
        )
        row = replace(row, estimated=needed.allocated)
        if kind is None:
            return row
        there = machine_of(kind, (1, row.world))
        seen = forecast(recipe, there, kind, plan=plan, images=(recipe.data.batch_size, 1))
    except CapabilityError:
        return row  # said as "-": layers that look at values have no estimate
    return replace(row, predicted=seen.images_per_second / row.world)


def measure(
    asked: Sequence[Contender],
    rounds: int,
    steps: int,
    warm_up: int,
    memory: float | None,
    tell: Callable[[str], None] = lambda text: None,
    keep: Callable[[Sequence[TrainingRow]], None] = lambda rows: None,
) -> list[TrainingRow]:
    """Run each `rounds` times, in turn. Who fails once is not run again.

    Args:
        asked: of `prepare`.
        rounds: runs of each.
        steps: measured in a run.
        warm_up: steps before them.
        memory: bytes of its GPU that each process is held to.
        tell: told what runs.
        keep: given all rows, after each run.
    """
    rows = [contender.row for contender in asked]
    for number in range(rounds):
        for place, contender in enumerate(asked):
            if rows[place].failed is not None:
                continue
            tell(f"run {number + 1} of {rounds}: {contender.row.name}, batch {contender.row.batch}")
            question = Question(contender.entry.source, contender.words, steps, warm_up, memory)
            rows[place] = _with(rows[place], run_processes(question, contender.row.world))
            keep(rows)
    return rows


def _with(row: TrainingRow, answers: Sequence[dict[str, Any]] | str) -> TrainingRow:
    """A row and what the ranks of one more run said."""
    if isinstance(answers, str):
        return replace(row, failed=answers, rounds=())
    slowest = tuple(max(each) for each in zip(*(answer["seconds"] for answer in answers), strict=True))
    return replace(
        row,
        rounds=(*row.rounds, slowest),
        loss=answers[0]["loss"],
        peak=_most(answers, "peak", row.peak),
        reserved=_most(answers, "reserved", row.reserved),
    )


def _most(answers: Sequence[dict[str, Any]], name: str, before: int | None) -> int | None:
    known = [size for size in (*(answer[name] for answer in answers), before) if size is not None]
    return max(known, default=None)


def run_processes(question: Question, world: int) -> list[dict[str, Any]] | str:
    """One run in processes of its own, none of which is left when this returns or raises.

    Returns:
        What each rank answered, or why there is no answer.
    """
    with tempfile.TemporaryDirectory() as name:
        file, log = Path(name, "question.json"), Path(name, "log.txt")
        question.write(file)
        with log.open("w") as printed:
            # A session of its own, so that all that it starts can be ended together, and a Ctrl-C is for this process.
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(file)], stdout=printed, stderr=printed, start_new_session=True
            )
            try:
                code = process.wait()
                _wait_for_the_others(process.pid)
            finally:
                _end(process)
        found = [answer_file(file, rank) for rank in range(world)]
        answers = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.is_file()]
        failed = [answer["failed"] for answer in answers if "failed" in answer]
        if failed:
            return str(failed[0])
        if code or len(answers) < world:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            return f"the run ended with exit code {code}:\n    " + "\n    ".join(lines[-LINES:])
        return answers


def _living(group: int) -> bool:
    """Whether a process group has members that are no zombies, which nobody may be there to bury."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def _wait_for_the_others(group: int) -> None:
    """Rank 0 may end first; the other ranks have answers to write."""
    deadline = time.monotonic() + LINGER
    while _living(group) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run and all that it has started: there is nothing in it to save, and the next one wants the device."""
    deadline = time.monotonic() + LINGER
    with suppress(ProcessLookupError):
        while _living(process.pid) and time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)
    process.poll()
