"""`submit --estimate`: hours, memory and GPU-hours of a recipe on GPUs that need not be here, as a table."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from vit_efficient.cli import Parser, base_parser
from vit_efficient.errors import Problem, RecipeError, UserError
from vit_efficient.machine import PACKAGES, Gpu, Launch, Machine
from vit_efficient.measure.choose import SPARE
from vit_efficient.measure.forecast import CORES, Forecast, forecast
from vit_efficient.measure.gpus import KINDS, GpuKind, gpu_kind
from vit_efficient.measure.known import classes_of
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.scaling import IMAGES_A_CORE
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

NODE = 8  # GPUs of one, where only a number of GPUs is asked for
NUMBERS = tuple(2**n for n in range(11))
WIDTH = 80
Shape = tuple[int, int]  # nodes, GPUs of each


def shape_of(number: int) -> Shape:
    """Nodes of eight that so many GPUs are, or one that has fewer.

    Raises:
        UserError: the last node would have fewer than the others.
    """
    if number > NODE and number % NODE:
        raise UserError(
            f"--gpus {number}: a node is taken to have {NODE}, and {number} are no whole nodes. "
            "Take a multiple, or say how they lie: --nodes N --gpus-per-node G."
        )
    return -(-number // NODE), min(number, NODE)


def machine_of(kind: GpuKind, shape: Shape) -> Machine:
    """What a process finds on such GPUs, one for each; every optional package is taken to be installed."""
    nodes, each = shape
    gpus = (Gpu(kind.name, kind.capability, int(kind.memory)),) * each
    return Machine(
        gpus, "", CORES * each, dict.fromkeys(PACKAGES, ""), Launch("srun", nodes * each, nodes, each, CORES)
    )


def placed(recipe: Recipe, shape: Shape) -> Recipe:
    """The recipe on those GPUs. A micro-batch that does not divide a GPU's images becomes the next that does."""
    nodes, each = shape
    strategy = recipe.strategy
    update: dict[str, object] = {"accelerator": "gpu"}
    if hasattr(strategy, "devices"):
        update |= {"devices": each, "nodes": nodes}
    share = recipe.data.batch_size // (nodes * each)
    if strategy.micro_batch is not None and share:
        update["micro_batch"] = max(n for n in range(1, min(strategy.micro_batch, share) + 1) if share % n == 0)
    return recipe.model_copy(update={"strategy": strategy.model_copy(update=update)})


def refusals(recipe: Recipe, kind: GpuKind, shape: Shape) -> list[Problem]:
    """What `fit` would refuse there, but for data that is not here and a batch that cannot be shared."""
    found = check(placed(recipe, shape), machine_of(kind, shape), trains=True)
    return [problem for problem in found if problem.path not in ("data.shards", "data.batch_size")]


def table(
    recipe: Recipe, kind: GpuKind, shapes: Sequence[Shape] | None = None, *, images: tuple[int, int] | None = None
) -> str:
    """Lines of at most 80 columns: one for each number of GPUs.

    Args:
        recipe: its strategy may be `auto`, which then decides for each line; precision as it is or `auto`.
        kind: of the GPUs.
        shapes: None: 1 to 1,024 GPUs, eight to a node.
        images: to train and to evaluate with; None: by the name of the data's source.

    Raises:
        RecipeError: the recipe runs on none of them.
        UserError: the number of images is not known.
    """
    shapes = [shape_of(number) for number in NUMBERS] if shapes is None else shapes
    precision = resolve(recipe, replace(machine_of(kind, (1, 1)), launch=None))[0].quantization
    recipe = recipe.model_copy(update={"quantization": precision})
    refused = {shape: refusals(recipe, kind, shape) for shape in shapes}
    if all(refused.values()):
        raise RecipeError(list(dict.fromkeys(problem for found in refused.values() for problem in found)))
    plan = Plan(recipe, classes_of(recipe))
    lines = [
        f"{recipe.variant} on {recipe.protocol}, {recipe.quantization.precision}, batch {recipe.data.batch_size}, "
        f"{recipe.optim.epochs} epochs",
        *textwrap.wrap(f"{kind.name}: {kind.memory / 2**30:.0f} GiB; {kind.source}", WIDTH),
        "",
        f"{'GPUs':>5} {'micro':>6} {'GiB each':>9} {'images/s':>9} {'each':>7} {'of one':>7} {'hours':>8} "
        f"{'GPU-hours':>10}",
    ]
    alone: float | None = None
    signs: set[str] = set()
    for shape in shapes:
        number = shape[0] * shape[1]
        name = str(number) if shape == (max(1, number // NODE), min(number, NODE)) else f"{shape[0]}x{shape[1]}"
        if recipe.data.batch_size % number:
            lines.append(f"{name:>5}  a batch of {recipe.data.batch_size} cannot be shared equally")
            continue
        if refused[shape]:
            lines.append(f"{name:>5}  refused: {', '.join(problem.path for problem in refused[shape])}")
            continue
        row = forecast(placed(recipe, shape), machine_of(kind, shape), kind, plan=plan, images=images)
        each = row.images_per_second / number
        alone = each if number == 1 else alone
        share = f"{each / alone:.3f}" if alone else "-"
        sign = _sign(row)
        signs |= set(sign.split("+"))
        lines.append(
            f"{name:>5} {row.micro_batch:>6} {row.memory / 2**30:>9.1f} {row.images_per_second:>9,.0f} {each:>7,.0f} "
            f"{share:>7} {row.hours:>8.1f} {row.gpu_hours:>10.1f}  {sign}".rstrip()
        )
    unique = dict.fromkeys(str(problem) for found in refused.values() for problem in found)
    lines += ["", *(line for text in unique for line in textwrap.wrap(f"refused: {text}", WIDTH))]
    return "\n".join([*lines, *_legend(signs), *_honesty(kind, recipe)])


MEANINGS = {
    "ckpt": "checkpointing",
    "fsdp": "sharded",
    "off": "in the host's memory",
    "too large": f"more than the {1 - SPARE:.0%} of a GPU's memory that may be planned with",
}


def _sign(row: Forecast) -> str:
    """How a line is run, as far as it is not the plainest way; or that it does not fit."""
    if not row.fits:
        return "too large"
    how = {"fsdp": row.layout.kind == "fsdp", "off": row.layout.offload_states, "ckpt": row.checkpointing}
    return "+".join(sign for sign, holds in how.items() if holds)


def _legend(signs: set[str]) -> list[str]:
    return [f"{sign}: {meaning}" for sign, meaning in MEANINGS.items() if sign in signs]


def _honesty(kind: GpuKind, recipe: Recipe) -> list[str]:
    """What of the table is measured."""
    if kind.measured:
        first = "Fitted to ViT-L/16 measured on one and two H200s; the rest is predicted."
    else:
        first = f"All predicted for {kind.name}: peaks by datasheet, times the share an H200 reaches."
    integer = recipe.quantization.name == "int8"
    slow = ["Training in int8 is predicted too slow: 670 images/s where 1,123 were measured (ViT-L, int8)."]
    return [
        first,
        *(slow if integer else []),
        "Memory is counted: within 15 % of what was measured, 11 % too low for ZeRO 3.",
        f"Data: {CORES} cores a GPU at {IMAGES_A_CORE:.0f} images/s each. Details: docs/scaling.md.",
    ]


# Words of `submit` that mean nothing here, and what to do instead.
ELSEWHERE = {
    "--site": "it asks for no cluster: leave it out, and name the GPUs with --gpu",
    "--time": "hours are what it predicts: leave it out",
    "--tasks-per-node": "a GPU has one process: leave it out",
    "--array": "it takes one recipe at a time: leave it out",
    "--dry-run": "it submits nothing: leave it out",
}


def parser() -> Parser:
    """The command line of `submit --estimate`."""
    words = base_parser(
        "submit --estimate", "Predict hours, memory and GPU-hours of a recipe on GPUs that need not be here."
    )
    words.add_argument("--gpu", default="h200", metavar="KIND", help=f"{', '.join(KINDS)} (h200)")
    words.add_argument("--gpus", type=_numbers, metavar="1,2,8", help="numbers of GPUs, eight to a node (1 to 1024)")
    words.add_argument("--nodes", type=_number, metavar="N", help="nodes, in place of --gpus")
    words.add_argument("--gpus-per-node", type=_number, metavar="G", help="GPUs of each (1)")
    words.add_argument(
        "--images",
        type=_natural,
        nargs=2,
        metavar=("TRAIN", "EVAL"),
        help="how many there are, where that is not known",
    )
    return words


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return int(text)


def _number(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    numbers = text.split(",")
    if strange := [word for word in numbers if not word.isdigit() or int(word) == 0]:
        raise argparse.ArgumentTypeError(f"{strange[0]!r} is no number of GPUs. Write --gpus 1,2,8")
    return [int(word) for word in numbers]


def _shapes(options: argparse.Namespace) -> list[Shape] | None:
    if options.nodes is None and options.gpus_per_node is None:
        return [shape_of(number) for number in options.gpus] if options.gpus else None
    if options.gpus:
        raise UserError("--gpus says how many GPUs in all, --nodes and --gpus-per-node how they lie: give one of them.")
    return [(options.nodes or 1, options.gpus_per_node or 1)]


def main(words: Sequence[str]) -> None:
    """Print the table.

    Args:
        words: ``--recipe R --gpu KIND [--gpus 1,2,8 | --nodes N --gpus-per-node G] [--images TRAIN EVAL] [key=value]``.

    Raises:
        UserError: unknown recipe, GPU or key; what a recipe cannot do on such GPUs.
    """
    words = [word for word in words if word != "--estimate"]
    names = [word.partition("=")[0] for word in words]
    for name in names:
        if name in ELSEWHERE:
            raise UserError(f"{name} is a word of submitting; with --estimate {ELSEWHERE[name]}.")
    if names.count("--recipe") > 1:  # of which the parser would keep the last
        raise UserError("--recipe is given more than once, and --estimate takes one recipe at a time.")
    options = parser().parse_intermixed_args(words)
    if options.images and not options.images[0]:
        raise UserError("--images: there is nothing to train with; TRAIN is at least 1.")
    kind = gpu_kind(options.gpu)
    shapes = _shapes(options)
    loaded = load_recipe(options.recipe, options.overrides)
    if loaded.recipe.strategy.accelerator == "cpu":
        raise UserError("strategy.accelerator is cpu, and --estimate predicts for GPUs: leave it out.")
    for note in loaded.notes:
        print(note)
    print(table(loaded.recipe, kind, shapes, images=tuple(options.images) if options.images else None))
