"""What there is to run, and what this machine can run.

python -m vit_efficient
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from vit_efficient import __version__
from vit_efficient.cli import Parser, run_command
from vit_efficient.errors import UserError
from vit_efficient.machine import Machine, detect, summary
from vit_efficient.recipe import files
from vit_efficient.recipe.compat import caveats, check, resolve
from vit_efficient.recipe.load import load_recipe

COMMANDS = {
    "fit": "train a variant under a protocol, evaluate it, and keep it all in a run folder",
    "submit": "train on a Slurm cluster; see where submitted runs stand, what they print, cancel them",
    "quantize": "quantize pretrained weights on a few images; find the sensitive layers; verify a model file",
    "evaluate": "evaluate a trained run, or pretrained weights under a recipe's quantization",
    "export": "merge adapters into their base: one plain model file",
    "compare": "hold finished runs of several variants and seeds against each other",
    "prepare": "turn images into the shards that the other commands read; check them",
    "benchmark": "hold models against each other: latency, images a second, memory; measure the data pipeline",
}

REQUIRED = (
    "torch", "torchvision", "lightning", "timm", "torchmetrics", "webdataset", "tensorboard", "bitsandbytes", "peft",
    "simplejpeg",
)  # fmt: skip
OPTIONAL = {  # how to install it, and what for where a recipe can ask for it
    "flash-attn": ("flash-attn --no-build-isolation", "attention=flash2"),
    "deepspeed": ("deepspeed", ""),
    "torchao": ("torchao", "quantization=torchao"),
    "pyarrow": ("pyarrow", "prepare parquet"),
    "s3fs": ("s3fs", "shards at s3://"),
    "onnx": ("onnx", ""),
    "onnxruntime": ("onnxruntime", ""),
}
PROTOCOL = "digits"  # what the variants are asked about: it needs nothing but the package


def _table(title: str) -> Table:
    table = Table(title=title, title_style="bold", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.show_header = False
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    return table


def commands() -> Table:
    """The commands, one a line."""
    table = _table("Commands   (python -m vit_efficient.COMMAND --help)")
    for name, does in COMMANDS.items():
        table.add_row(name, does)
    return table


def machine_table(machine: Machine) -> Table:
    """Cores, GPUs, driver, and what is installed."""
    table = _table("This machine")
    for what, value in summary(machine):
        table.add_row(what, value)
    table.add_row(
        "packages", ", ".join(f"{name} {machine.packages[name]}" for name in REQUIRED if machine.version(name))
    )
    for name in REQUIRED:
        if machine.version(name) is None:
            table.add_row(name, f"[red]missing[/]: pip install {name}")
    for name, (install, purpose) in OPTIONAL.items():
        needed = f", needed for {purpose}" if purpose else ""
        table.add_row(name, machine.version(name) or f"[yellow]absent[/]{needed}: pip install {install}")
    return table


def variants(machine: Machine) -> Table:
    """Which of the shipped variants can run here, and why not."""
    table = _table(f"Variants here   (on the protocol {PROTOCOL})")
    table.add_column(overflow="fold")
    for name in files.names("variant"):
        table.add_row(name, *_verdict(name, machine))
    return table


def _verdict(name: str, machine: Machine) -> Iterator[str]:
    recipe, _ = resolve(load_recipe(name, [f"protocol={PROTOCOL}"]).recipe, machine)
    problems = check(recipe, machine)
    yield "[red]no[/]" if problems else "[green]yes[/]"
    if problems:
        yield "\n".join(problem.message for problem in problems)
    else:
        where = f"{recipe.quantization.precision} on the {recipe.strategy.accelerator.upper()}"
        yield "\n".join([where, *(f"[dim]{line}[/]" for line in caveats(recipe, machine))])


def main() -> None:
    """Print the page."""
    about = "Lists the commands and says what this machine can run."
    _, rest = Parser(prog="python -m vit_efficient", description=about).parse_known_args()
    if rest:
        if rest[0] in COMMANDS:
            raise UserError(f"a command is a module of its own: python -m vit_efficient.{rest[0]} --help")
        near = difflib.get_close_matches(rest[0], COMMANDS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise UserError(
            f"there is no command {rest[0]!r}.{meant} There are {', '.join(COMMANDS)}, each a module of its own: "
            f"python -m vit_efficient.{near[0] if near else 'COMMAND'} --help"
        )
    console = Console(highlight=False)
    machine = detect()
    console.print(f"[bold]vit_efficient {__version__}[/]\n")
    for table in (commands(), machine_table(machine), variants(machine)):
        console.print(table)
        console.print()
    console.print("Begin with  [bold]python -m vit_efficient.fit --recipe int8_sdpa[/]")


if __name__ == "__main__":
    run_command(main)
