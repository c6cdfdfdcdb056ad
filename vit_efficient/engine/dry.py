"""`fit --dry-run`: what would happen, without it happening."""

from __future__ import annotations

import re

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.engine.setup import build_data
from vit_efficient.engine.trainer import accumulate, quiet, world_size
from vit_efficient.errors import CapabilityError, DataError, Problem, UserError
from vit_efficient.machine import Machine
from vit_efficient.measure.memory import estimate
from vit_efficient.measure.units import count, size
from vit_efficient.model.build import build_model, compute_dtype
from vit_efficient.model.distill import find_teacher
from vit_efficient.recipe.compat import caveats
from vit_efficient.recipe.load import dump_recipe
from vit_efficient.recipe.schema import Recipe


def dry_run(recipe: Recipe, machine: Machine, problems: list[Problem], console: Console) -> None:
    """Print the resolved recipe, parameter counts, the memory estimate, and whether this machine can run it."""
    quiet()
    console.print(Syntax(_without_passwords(dump_recipe(recipe)), "yaml", background_color="default", word_wrap=True))
    reasons = [str(p) for p in problems]
    classes = recipe.model.num_classes
    try:
        data = build_data(recipe)
        classes = data.num_classes
        steps = f"{data.train_images:,} training images, {data.steps_per_epoch} steps an epoch"
    except DataError as error:
        if not any(p.path == "data.shards" for p in problems):
            reasons.append(str(error))
        steps = "unknown: the data is not there"
    distilled = getattr(recipe.quantization, "distill", None) is not None
    try:
        find_teacher(recipe)
    except UserError as error:
        reasons.append(str(error))
    torch.manual_seed(recipe.run.seed)
    table = Table(show_header=False, title="what it comes to", title_justify="left", title_style="bold")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("data", steps)
    table.add_row("batch", f"{recipe.data.batch_size} = {recipe.strategy.micro_batch} x {world_size(recipe)} device(s) "
                           f"x {accumulate(recipe)} accumulated")  # fmt: skip
    lines: list[str] = []
    if classes is None:
        table.add_row("classes", "unknown without the data; set `model.num_classes` for the sizes")
    else:
        # Weights decide neither sizes nor memory, and may not be here: a base is trained when it is needed.
        # SDPA keeps what FlashAttention keeps for the backward pass, and runs where the estimate is made.
        weightless = recipe.model.model_copy(update={"weights": None})
        plain = recipe.model_copy(update={"model": weightless, "attention": SdpaConfig()})
        try:
            built = build_model(plain, classes)
        except CapabilityError as error:
            reasons.append(str(error))
        else:
            lines = built.report.lines()
            table.add_row("parameters", f"{count(built.parameters)} ({built.parameters:,})")
            table.add_row("trained", f"{count(built.trainable)} ({built.trainable:,})")
            table.add_row(
                "quantized", f"{count(built.report.quantized_parameters)} ({built.report.quantized_parameters:,})"
            )
            assert recipe.strategy.micro_batch is not None
            needed = estimate(
                built.model,
                list(built.blocks),
                image_size=built.image.size,
                dtype=compute_dtype(recipe),
                micro_batch=recipe.strategy.micro_batch,
                optimizer=recipe.optim.name,
                average=recipe.optim.ema is not None,
                checkpointing=recipe.strategy.checkpointing,
                # taken to be as large as the model itself
                teacher=built.parameters * compute_dtype(recipe).itemsize if distilled else 0,
            )
            table.add_section()
            for what, number in needed.rows():
                table.add_row(what, size(number))
            table.add_row("estimated GPU memory", f"[bold]{size(needed.total)}[/] a device")
            if (
                machine.gpus
                and recipe.strategy.accelerator == "gpu"
                and needed.total > min(g.memory for g in machine.gpus)
            ):
                reasons.append(
                    f"it needs about {size(needed.total)} and the GPU has {size(min(g.memory for g in machine.gpus))}: "
                    "lower `strategy.micro_batch`, or set `strategy.checkpointing=true`"
                )
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


def _without_passwords(text: str) -> str:
    """Credentials belong in `~/.netrc`, but a URL may have them all the same."""
    return re.sub(r"://[^/@\s]+@", "://", text)
