"""docs/support.md: what works with what, asked of `compat.check` for machines described by hand; see `make docs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from vit_efficient.machine import PACKAGES, Gpu, Launch, Machine
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe

GIB = 2**30
INSTALLED = dict.fromkeys(PACKAGES, "installed")


def _machine(name: str, capability: tuple[int, int], gib: int, count: int = 1) -> Machine:
    return Machine((Gpu(name, capability, gib * GIB),) * count, "installed", 16, INSTALLED)


MACHINES = {
    "CPU": Machine(cores=16, packages=INSTALLED),
    "T4": _machine("Tesla T4", (7, 5), 16),
    "A100": _machine("NVIDIA A100", (8, 0), 80),
    "RTX 4090": _machine("NVIDIA GeForce RTX 4090", (8, 9), 24),
    "H100": _machine("NVIDIA H100", (9, 0), 80),
}
NODE = _machine("NVIDIA H100", (9, 0), 80, 4)
VARIANTS = {
    "fp32_sdpa": ("fp32_sdpa",),
    "bf16 or fp16 (`fp32_sdpa quantization.precision=auto`)": ("fp32_sdpa", "quantization.precision=auto"),
    "lora_sdpa": ("lora_sdpa",),
    "int8_sdpa": ("int8_sdpa",),
    "int8_static_sdpa": ("int8_static_sdpa",),
    "e4m3 values (`int8_sdpa quantization.attention=dynamic quantization.attention_values=fp8`)": (
        "int8_sdpa", "quantization.attention=dynamic", "quantization.attention_values=fp8",
    ),
    "int8_flash2": ("int8_flash2",),
    "w4a8_sdpa": ("w4a8_sdpa",),
    "fp8_sdpa": ("fp8_sdpa",),
    "fp8 attention (`fp8_sdpa quantization.attention=fp8`)": ("fp8_sdpa", "quantization.attention=fp8"),
    "int4_sdpa": ("int4_sdpa",),
    "int4_flash2": ("int4_flash2",),
    "LLM.int8 + LoRA (`quantization=bnb_int8 quantization.lora={}`)": (
        "fp32_sdpa", "quantization=bnb_int8", "quantization.lora={}",
    ),
    "int4_group_sdpa": ("int4_group_sdpa",),
    "torchao (`quantization=torchao`)": ("fp32_sdpa", "quantization=torchao"),
}  # fmt: skip
STRATEGIES = {
    "single": ("strategy=single",),
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "ZeRO 1": ("strategy=deepspeed", "strategy.stage=1"),
    "ZeRO 2": ("strategy=deepspeed", "strategy.stage=2"),
    "ZeRO 3": ("strategy=deepspeed", "strategy.stage=3"),
}
FURTHER = {
    "fsdp, `strategy.shard=hybrid` on two such nodes": ("strategy=fsdp", "strategy.shard=hybrid", "strategy.nodes=2"),
    "fsdp, `strategy.offload=true`": ("strategy=fsdp", "strategy.offload=true"),
    "ZeRO 1, `strategy.offload_optimizer=true`": (
        "strategy=deepspeed", "strategy.stage=1", "strategy.offload_optimizer=true",
    ),
    "ZeRO 2, `strategy.offload_optimizer=true`": (
        "strategy=deepspeed", "strategy.stage=2", "strategy.offload_optimizer=true",
    ),
    "ZeRO 3, both offloads": (
        "strategy=deepspeed", "strategy.stage=3", "strategy.offload_optimizer=true", "strategy.offload_parameters=true",
    ),
    "ZeRO 2, `strategy.offload_parameters=true`": (
        "strategy=deepspeed", "strategy.stage=2", "strategy.offload_parameters=true",
    ),
}  # fmt: skip
TRAINED = {
    "bf16": ("fp32_sdpa", "quantization.precision=bf16"),
    "fp16": ("fp32_sdpa", "quantization.precision=fp16"),
    "lora_sdpa": ("lora_sdpa",),
    "int8_sdpa": ("int8_sdpa",),
    "learned steps": ("int8_static_sdpa", "quantization.learn_scales=true"),
    "fp8_sdpa": ("fp8_sdpa",),
    "int4_sdpa": ("int4_sdpa",),
    "`optim.name=adamw8bit`": ("fp32_sdpa", "optim.name=adamw8bit"),
}
OPTIONS = {
    "`strategy.checkpointing=true`": ("strategy.checkpointing=true",),
    "`strategy.compile=true`": ("strategy.compile=true",),
    "both": ("strategy.checkpointing=true", "strategy.compile=true"),
    "`optim.ema=0.9999`": ("optim.ema=0.9999",),
    "`optim.name=adamw8bit`": ("optim.name=adamw8bit",),
    "`quantization.precision=fp16`": ("quantization.precision=fp16",),
    "learned steps, frozen at the end": ("quantization.learn_scales=true", "quantization.freeze_ranges=0.1"),
    "`checkpoint.sharded=true`": ("checkpoint.sharded=true",),
    "`checkpoint.asynchronous=true`": ("checkpoint.asynchronous=true",),
}
# Model files that `quantize` and `fit` write, by the recipe that makes them.
DEPLOYED = {
    "int8": ("int8_sdpa",),
    "int8, static": ("int8_static_sdpa",),
    "int8, integer attention": ("int8_sdpa", "quantization.attention=dynamic"),
    "int8 with `attention=flash2`": ("int8_flash2",),
    "W4A8": ("w4a8_sdpa",),
    "fp8": ("fp8_sdpa",),
    "int4, groups": ("int4_group_sdpa",),
    "NF4 (`quantization=int4 quantization.lora=null`)": ("int4_sdpa", "quantization.lora=null"),
    "NF4 with adapters": ("int4_sdpa",),
    "LLM.int8": ("fp32_sdpa", "quantization=bnb_int8"),
    "torchao": ("fp32_sdpa", "quantization=torchao"),
}  # fmt: skip
INTRO = """\
# What works with what

Made by `make docs` from the rules that every command asks before it does anything
(`recipe/compat.py`); nothing here is written by hand. A number refers to the reason below the table. What a rule cannot
know without building the model (head width, layers that `keep` matches) is refused when it is built. All optional
packages are taken to be installed. "yes" means that nothing speaks against it; what was really run, and where, is in
[scaling.md](scaling.md), [fsdp.md](fsdp.md), [deepspeed.md](deepspeed.md) and [results/](results/).
"""


def page() -> str:
    """The whole page."""
    parts = [INTRO]
    parts += _table(
        "Training a variant on one device",
        VARIANTS,
        dict.fromkeys(MACHINES, ()),
        lambda column: MACHINES[column],
        precision=True,
    )
    parts += _table("Training a variant on a node of four H100s", VARIANTS, STRATEGIES, lambda column: NODE)
    parts += _table("Hybrid shards and offloading there", FURTHER, TRAINED, lambda column: NODE)
    options = {name: ("int8_sdpa", *words) for name, words in OPTIONS.items()}
    parts += _table("Options of `int8_sdpa` there", options, STRATEGIES, lambda column: NODE)
    parts += _deployed()
    return "".join(parts)


def _deployed() -> Iterator[str]:
    """Where a quantized model runs once it is made (`evaluate`, `benchmark`), and in which precision by itself."""
    reasons: list[str] = []
    yield "\n## Running a quantized model\n\n"
    yield "A file that has static scales holds them: calibration images are for making it. Not for speed: what is\n"
    yield "faster where is in [choosing.md](choosing.md).\n\n"
    yield f"| | {' | '.join(MACHINES)} |\n|---|{'---|' * len(MACHINES)}\n"
    for name, words in DEPLOYED.items():
        cells = []
        for machine in MACHINES.values():
            recipe = resolve(load_recipe(words[0], ["quantization.precision=auto", *words[1:]]).recipe, machine)[0]
            found = [f"`{problem.path}` {problem.message}" for problem in check(recipe, machine)]
            reasons += [reason for reason in found if reason not in reasons]
            numbers = " ".join(f"({reasons.index(reason) + 1})" for reason in found)
            cells.append(f"no {numbers}" if found else recipe.quantization.precision)
        yield f"| {name} | {' | '.join(cells)} |\n"
    yield "\n" if reasons else ""
    yield from (f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))


def _table(
    title: str,
    rows: Mapping[str, Sequence[str]],
    columns: Mapping[str, Sequence[str]],
    machine: Callable[[str], Machine],
    *,
    precision: bool = False,
) -> Iterator[str]:
    reasons: list[str] = []
    yield f"\n## {title}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    for name, words in rows.items():
        cells = [_cell((*words, *columns[column]), machine(column), reasons, precision) for column in columns]
        yield f"| {name} | {' | '.join(cells)} |\n"
    yield "\n" if reasons else ""
    yield from (f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))


def _cell(words: Sequence[str], machine: Machine, reasons: list[str], precision: bool) -> str:
    """`yes`, or the numbers of the reasons why not; new ones are added to `reasons`."""
    (variant,) = (word for word in words if "=" not in word)
    settings = [word for word in words if "=" in word]
    recipe = load_recipe(variant, ["data.batch_size=64", *settings]).recipe
    nodes = getattr(recipe.strategy, "nodes", 1)
    if nodes > 1:  # as Slurm or torchrun start them
        each = len(machine.gpus)
        machine = replace(machine, launch=Launch("srun", nodes * each, nodes, each))
    found = [f"`{problem.path}` {problem.message}" for problem in check(recipe, machine, trains=True)]
    reasons += [reason for reason in dict.fromkeys(found) if reason not in reasons]
    if found:
        return "no " + " ".join(f"({reasons.index(reason) + 1})" for reason in dict.fromkeys(found))
    return resolve(recipe, machine)[0].quantization.precision if precision else "yes"
