"""`fit --dry-run`: what would happen, without it happening."""

from __future__ import annotations

import re

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from vit_efficient.engine.setup import build_data
from vit_efficient.engine.trainer import accumulate, quiet, world_size
from vit_efficient.errors import CapabilityError, DataError, Problem, UserError
from vit_efficient.machine import Machine
from vit_efficient.measure.choose import usable
from vit_efficient.measure.known import classes_of
from vit_efficient.measure.layout import Layout
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.units import count, size
from vit_efficient.model.distill import find_teacher
from vit_efficient.recipe.compat import caveats
from vit_efficient.recipe.load import dump_recipe
from vit_efficient.recipe.schema import Recipe


def dry_run(recipe: Recipe, machine: Machine, problems: list[Problem], console: Console) -> None:
    """Print the resolved recipe, parameter counts, the memory estimate, and whether this machine can run it."""
    quiet()
    console.print(Syntax(_without_passwords(dump_recipe(recipe)), "yaml", background_color="default", word_wrap=True))
    reasons = [str(p) for p in problems]
    classes = classes_of(recipe)
    taken = recipe.model.num_classes is None
    try:
        data = build_data(recipe)
        classes, taken = data.num_classes, False
        steps = f"{data.train_images:,} training images, {data.steps_per_epoch} steps an epoch"
    except DataError as error:
        if not any(p.path == "data.shards" for p in problems):
            reasons.append(str(error))
        steps = "unknown: the data is not there"
    try:
        find_teacher(recipe)
    except UserError as error:
        reasons.append(str(error))
    table = Table(show_header=False, title="what it comes to", title_justify="left", title_style="bold")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("data", steps)
    table.add_row("batch", f"{recipe.data.batch_size} = {recipe.strategy.micro_batch} x {world_size(recipe)} device(s) "
                           f"x {accumulate(recipe)} accumulated")  # fmt: skip
    if taken:
        table.add_row("classes", f"taken to be {classes:,}: the data is not there (`model.num_classes`)")
    lines: list[str] = []
    # Weights decide neither sizes nor memory, and may not be here: a base is trained when it is needed.
    plan = Plan(recipe, classes)
    try:
        built = plan.built
    except CapabilityError as error:
        reasons.append(str(error))
    else:
        lines = built.report.lines()
        table.add_row("parameters", f"{count(built.parameters)} ({built.parameters:,})")
        table.add_row("trained", f"{count(built.trainable)} ({built.trainable:,})")
        table.add_row(
            "quantized", f"{count(built.report.quantized_parameters)} ({built.report.quantized_parameters:,})"
        )
        table.add_section()
        reasons += _memory(plan, recipe, machine, table)
    console.print(table)
    for line in lines:
        console.print(f"  {line}")
    for line in caveats(recipe, machine):
        console.print(f"  [yellow]note[/] {line}")
    if reasons:
        console.print("\n[bold red]This machine cannot run it:[/]")
        for reason in reasons:
            console.print(f"  - {reason}")
    else:
        console.print("\n[bold green]This machine can run it.[/]")


def _memory(plan: Plan, recipe: Recipe, machine: Machine, table: Table) -> list[str]:
    """Rows of what each device holds; returns why it is too much, if it is."""
    assert recipe.strategy.micro_batch is not None, "resolve() makes the micro-batch concrete"
    try:
        needed = plan.estimate(
            Layout.of(recipe.strategy),
            recipe.strategy.micro_batch,
            checkpointing=recipe.strategy.checkpointing,
            accumulate=accumulate(recipe),
        )
    except CapabilityError as error:
        table.add_row("estimated GPU memory", str(error))
        return []
    for what, number in needed.rows():
        table.add_row(what, size(number))
    table.add_row("estimated GPU memory", f"[bold]{size(needed.total)}[/] a device")
    if not machine.gpus or recipe.strategy.accelerator != "gpu":
        return []
    smallest = min(gpu.memory for gpu in machine.gpus)
    if needed.total <= smallest:
        if needed.total > usable(smallest):
            table.add_row("of the GPU's", f"{size(smallest)}: it may not fit, for the estimate is not exact")
        return []
    return [
        f"it needs about {size(needed.total)} and the GPU has {size(smallest)}: "
        "lower `strategy.micro_batch`, or set `strategy.checkpointing=true`"
    ]


def _without_passwords(text: str) -> str:
    """Credentials belong in `~/.netrc`, but a URL may have them all the same."""
    return re.sub(r"://[^/@\s]+@", "://", text)
