"""What works with what, on which machine: open choices made concrete, and the reasons why a recipe cannot run."""

from __future__ import annotations

import re
from typing import Any, Literal

from vit_efficient.errors import Problem
from vit_efficient.machine import Launch, Machine
from vit_efficient.parallel.config import (
    AutoConfig,
    DdpConfig,
    DistributedConfig,
    SingleConfig,
    devices,
)
from vit_efficient.recipe.deepspeed import deepspeed_caveats, deepspeed_problems
from vit_efficient.recipe.fsdp import fsdp_problems
from vit_efficient.recipe.schema import Recipe

MAX_WORKERS = 8
BF16_FROM = (8, 0)  # compute capability with bfloat16 units


def resolve(recipe: Recipe, machine: Machine) -> tuple[Recipe, list[str]]:
    """Decide everything that the recipe leaves to the machine. Decides too where `check` then finds a problem.

    Returns:
        The recipe with concrete `strategy`, `quantization.precision` and `data.workers`, and a line for each decision.
        A resolved recipe comes back as it is.
    """
    notes: list[str] = []

    def decided(key: str, value: object, why: str) -> None:
        notes.append(f"{key} = {value}: {why}")

    strategy = recipe.strategy
    if strategy.accelerator == "auto":
        accelerator = "gpu" if machine.gpus else "cpu"
        decided("strategy.accelerator", accelerator, f"{_gpus(machine)} here")
        strategy = strategy.model_copy(update={"accelerator": accelerator})
    on_gpu = strategy.accelerator == "gpu"
    here, nodes = max(1, len(machine.gpus)) if on_gpu else 1, 1
    if machine.launch is not None:
        here, nodes = machine.launch.per_node, machine.launch.nodes

    if isinstance(strategy, AutoConfig):
        common = strategy.model_dump(exclude={"name"})
        several = here * nodes > 1
        strategy = DdpConfig(**common, devices=here, nodes=nodes) if several else SingleConfig(**common)
        why = f"{here} device{'s' * (here > 1)}" if nodes == 1 else f"{nodes} nodes x {here} devices"
        decided("strategy.name", strategy.name, why)
    elif isinstance(strategy, DistributedConfig) and strategy.devices == "auto":
        strategy = strategy.model_copy(update={"devices": here})
        why = "one process for each GPU" if on_gpu else "one process on a CPU"
        decided("strategy.devices", here, f"as {machine.launch.by} started them" if machine.launch else why)
    per_node, nodes = devices(strategy)

    if strategy.micro_batch is None:
        share = max(1, recipe.data.batch_size // (per_node * nodes))
        world = per_node * nodes
        why = f"{recipe.data.batch_size} images over {world} devices" if world > 1 else "the whole batch"
        strategy = strategy.model_copy(update={"micro_batch": share})
        decided("strategy.micro_batch", share, why)

    quantization = recipe.quantization
    if quantization.precision == "auto":
        precision, why = _precision(machine, on_gpu)
        quantization = quantization.model_copy(update={"precision": precision})
        decided("quantization.precision", precision, why)

    data = recipe.data
    if data.workers is None:
        share = machine.cores // per_node
        why = f"{machine.cores} cores, {per_node} training process{'es' * (per_node > 1)}"
        if machine.launch is not None and machine.launch.cores is not None:
            share, why = machine.launch.cores, f"{machine.launch.cores} cores for each training process"
        workers = min(MAX_WORKERS, max(0, share - 1))  # one core is left to the process that trains
        data = data.model_copy(update={"workers": workers})
        decided("data.workers", workers, why)

    update = {"strategy": strategy, "quantization": quantization, "data": data}
    return recipe.model_copy(update=update), notes


def _gpus(machine: Machine) -> str:
    return f"{machine.gpus_on_node or 'no'} GPU{'s' * (machine.gpus_on_node != 1)}"


def _precision(machine: Machine, on_gpu: bool) -> tuple[str, str]:
    if not on_gpu:
        return "fp32", "on a CPU"
    if not machine.gpus:
        return "bf16", "there is no GPU here to ask"
    gpu = min(machine.gpus, key=lambda gpu: gpu.capability)
    precision = "bf16" if gpu.capability >= BF16_FROM else "fp16"
    return precision, f"{gpu.name} is sm_{gpu.capability[0]}{gpu.capability[1]}"


def check(recipe: Recipe, machine: Machine, *, chooses_layers: bool = False, trains: bool = False) -> list[Problem]:
    """Every reason why this machine cannot run the recipe; empty if it can.

    Args:
        recipe: resolved or not.
        machine: where it shall run.
        chooses_layers: whether the command finds out what `keep: auto` means.
        trains: whether the command trains.

    Knows no model: what depends on it (head width, layers that `keep` matches) is found when it is built.
    """
    recipe, _ = resolve(recipe, machine)
    problems = [*_devices(recipe, machine), *_batch(recipe), *_data(recipe), *_combined(recipe)]
    problems += [*fsdp_problems(recipe), *deepspeed_problems(recipe, machine)]
    if trains and (reason := _untrainable(recipe)):
        problems.append(Problem("quantization", reason))
    if getattr(recipe.quantization, "keep", None) == "auto" and not chooses_layers:
        message = "is auto, which `python -m vit_efficient.quantize` decides on images. Name the layers that it found"
        problems.append(Problem("quantization.keep", message, suggestion="[patch_embed, head]"))
    if recipe.strategy.accelerator == "gpu" and not machine.gpus:
        return problems  # what the parts would say is the same again
    device: Literal["cuda", "cpu"] = "cuda" if recipe.strategy.accelerator == "gpu" else "cpu"
    precision = recipe.quantization.precision
    problems += _refused("attention", recipe.attention.refusal(machine, precision, device=device))
    problems += _refused("quantization", recipe.quantization.refusal(machine, precision, device))
    if recipe.optim.name == "adamw8bit" and machine.version("bitsandbytes") is None:
        message = "adamw8bit needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
        problems.append(Problem("optim.name", message))
    return problems


def caveats(recipe: Recipe, machine: Machine) -> list[str]:
    """What is known to disappoint on this machine although it runs; a line each."""
    recipe, _ = resolve(recipe, machine)
    lines = []
    if recipe.quantization.name == "int4":
        lines.append("4-bit weights make a model smaller, not faster: they are unpacked for every product")
    if recipe.quantization.name == "bnb_int8":
        lines.append("LLM.int8 is slower than bf16: 0.40 times its speed for ViT-L/16 on an H200, eager")
    if recipe.quantization.name == "torchao" and recipe.quantization.scheme.startswith("int8_dynamic"):
        lines.append(
            "torchao's dynamic int8 is slower than bf16: 0.74 times its speed for ViT-L/16 on an H200, compiled"
        )
    lines += deepspeed_caveats(recipe)
    old = [gpu.name for gpu in machine.gpus if gpu.capability < BF16_FROM]
    if recipe.quantization.name == "int8" and recipe.strategy.accelerator == "gpu" and old:
        lines.append(f"int8 makes a model smaller on a {old[0]}, not faster")
    return lines


def _combined(recipe: Recipe) -> list[Problem]:
    """Parts that exclude each other."""
    integer = getattr(recipe.quantization, "attention", "none")
    if integer != "none" and recipe.attention.name != "sdpa":
        message = (
            f"is {integer}, which takes the place of the attention kernel, and attention={recipe.attention.name} asks "
            "for another. Take attention=sdpa, or quantization.attention=none"
        )
        return [Problem("quantization.attention", message)]
    return _padded(recipe)


def _padded(recipe: Recipe) -> list[Problem]:
    """Padding does not change what real tokens give, unless tokens share something."""
    if not recipe.model.pad_tokens:
        return []
    quantization: Any = recipe.quantization
    shared = None
    if getattr(quantization, "dynamic_scale", "token") == "tensor":
        shared = "quantization.dynamic_scale=tensor chooses one scale for all tokens"
    elif quantization.name == "fp8" and quantization.activations == "tensor":
        shared = "quantization.activations=tensor chooses one scale for all tokens"
    elif quantization.name == "bnb_int8":
        shared = "LLM.int8 chooses its columns of full precision for all tokens"
    if shared is None:
        return []
    message = f"is {recipe.model.pad_tokens}, and {shared}, the padding among them. Take model.pad_tokens=0"
    return [Problem("model.pad_tokens", message)]


# Whose weights stay as they were quantized: adapters are all that can be trained there.
FROZEN = ("int4", "bnb_int8", "torchao")


def _untrainable(recipe: Recipe) -> str | None:
    """Why a recipe leaves nothing to train, and what to do."""
    quantization: Any = recipe.quantization
    if quantization.name not in FROZEN or getattr(quantization, "lora", None) is not None:
        return None
    adapters = "take a variant that trains"
    if hasattr(quantization, "lora") and getattr(quantization, "type", None) != "int":
        adapters = "set quantization.lora, or take a variant that trains"
    return (
        f"{quantization.name} leaves nothing to train here: {adapters}. Without training: "
        "`python -m vit_efficient.quantize` makes a model file, `evaluate` counts how good it is"
    )


def _refused(section: str, reason: str | None) -> list[Problem]:
    """A part's refusal as a problem. Refusals name a key first (``attention: flash2``, ``quantization.lora``)."""
    if reason is None:
        return []
    named = re.match(rf"`?({section}[\w.]*)(?:=|: )(\w+)`?(.*)", reason, re.DOTALL)
    return [Problem(named[1], named[2] + named[3]) if named else Problem(section, reason)]


def _devices(recipe: Recipe, machine: Machine) -> list[Problem]:
    strategy = recipe.strategy
    if strategy.accelerator == "gpu" and not machine.gpus:
        message = "is gpu, and there is no GPU that torch can use"
        if machine.driver:
            message += f" (the driver is {machine.driver}: this torch may be built for a newer one)"
        message += ". Take strategy.accelerator=cpu, or another machine"
        return [Problem("strategy.accelerator", message)]
    per_node, nodes = devices(strategy)
    problems = _launched(strategy, machine.launch) if machine.launch is not None else []
    if machine.launch is None and nodes > 1:
        message = (
            f"is {nodes}, and this command starts processes on its own machine alone: they would wait for the others "
            "in vain. Start it on all by torchrun (docs/slurm.md), or by `python -m vit_efficient.submit`"
        )
        problems.append(Problem("strategy.nodes", message, allowed="1, where nobody has started the other nodes"))
    if not problems and strategy.accelerator == "gpu" and per_node > machine.gpus_on_node:
        message = f"is {per_node}, and {'the job' if machine.launch else 'this machine'} has {_gpus(machine)}"
        message += " on each node" if machine.launch else ""
        problems.append(Problem("strategy.devices", message, allowed=f"1 to {machine.gpus_on_node}, or auto"))
    return problems


def _launched(strategy: object, launch: Launch) -> list[Problem]:
    """Where a recipe and the processes that were started for it disagree."""
    if launch.processes % launch.nodes:
        message = f"{launch.by} starts {launch.processes} processes on {launch.nodes} nodes, not equally many on each"
        return [Problem("strategy.devices", message)]
    started = f"{launch.by} starts {launch.nodes} node{'s' * (launch.nodes > 1)} x {launch.per_node} processes"
    if not hasattr(strategy, "devices") and launch.processes > 1:
        message = f"is {getattr(strategy, 'name', '')}, one process, and {started}. Take strategy=ddp"
        return [Problem("strategy.name", message)]
    wanted = zip(("devices", "nodes"), devices(strategy), (launch.per_node, launch.nodes), strict=True)
    return [
        Problem(f"strategy.{key}", f"is {asked}, and {started}", suggestion=f"strategy.{key}={given}")
        for key, asked, given in wanted
        if asked != given
    ]


def _batch(recipe: Recipe) -> list[Problem]:
    per_node, nodes = devices(recipe.strategy)
    world, batch, micro = per_node * nodes, recipe.data.batch_size, recipe.strategy.micro_batch
    assert micro is not None, "resolve() makes it concrete"
    if batch % world:
        near = f"{batch - batch % world or world} or {batch + world - batch % world}"
        message = f"is {batch}, which {world} devices cannot share equally; the nearest that they can: {near}"
        return [Problem("data.batch_size", message)]
    share = batch // world
    if share % micro:
        each = f"{share} images that each of {world} devices has" if world > 1 else f"{share} images"
        message = f"is {micro}, which does not divide the {each} of data.batch_size={batch}"
        return [Problem("strategy.micro_batch", message, allowed=", ".join(map(str, _divisors(share))))]
    return []


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _data(recipe: Recipe) -> list[Problem]:
    return [*_decoder(recipe), *_shards(recipe)]


def _decoder(recipe: Recipe) -> list[Problem]:
    """What `data.decoder: device` cannot do."""
    if recipe.data.decoder != "device":
        return []
    otherwise = "Take data.decoder=fast"
    problems = []
    if recipe.strategy.accelerator != "gpu":
        problems.append(f"is device, which decodes on an NVIDIA GPU, and this runs on a CPU. {otherwise}")
    if recipe.augment.rand_augment:
        problems.append(f"is device, and augment.rand_augment works on the CPU's pixels. {otherwise}, or set it to 0")
    if recipe.data.on_error == "skip":
        problems.append(f"is device, which finds bad images too late to leave them out. {otherwise}")
    return [Problem("data.decoder", message) for message in problems]


def _shards(recipe: Recipe) -> list[Problem]:
    data = recipe.data
    if data.shards or data.eval_shards or data.source.name == "digits":
        return []
    command = f"python -m vit_efficient.prepare {data.source.name} ... --out DIR"
    message = f"is not set, and only digits prepares itself: make shards with `{command}` and set data.shards=DIR"
    return [Problem("data.shards", message)]
