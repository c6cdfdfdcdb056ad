"""`strategy: auto`: the simplest way to run a recipe that fits the GPUs, and why.

The order is that of simplicity, and of speed as far as it is known (docs/scaling.md):

1. one process a GPU, nothing recomputed; the whole share of the batch at once;
2. the same with smaller micro-batches, which accumulate to the same batch: nothing is computed twice, but below some
   tens of images launching takes longer than the arithmetic;
3. with checkpointing: a third of the arithmetic more, and a fifth of the memory;
4. sharded (FSDP2), which saves weights, gradients and states but no activations; first without recomputation;
5. sharded, with all of it in the host's memory but the block at work: slow, and the last that there is.

Sharding comes after checkpointing because a Vision Transformer's memory is activations: of ViT-L/16's 26.9 GiB at 128
images in bf16, 21.8 are activations and 5.1 can be sharded at all. For the same reason 4-bit weights are no step of
this ladder: nf4 saves 0.45 GB of ViT-L against LoRA on bf16, and checkpointing twenty.

Where srun or torchrun started the processes, their number on each node is fixed, and only the rest is decided. Every
process decides for itself, from the same recipe and from GPUs of the same kind, so all decide the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vit_efficient.machine import Machine
from vit_efficient.measure.gpus import H200, kind_of
from vit_efficient.measure.layout import Layout
from vit_efficient.measure.memory import Plan
from vit_efficient.measure.scaling import ADAPTED, LAUNCH, compute_seconds
from vit_efficient.measure.units import size
from vit_efficient.parallel.config import FsdpConfig
from vit_efficient.recipe.fsdp import fsdp_problems
from vit_efficient.recipe.schema import Recipe

# Of a GPU's memory, left free: what lies between the allocator's blocks, and the estimate's own error (at most 1 % too
# low where it was measured).
SPARE = 0.08


def usable(memory: float) -> int:
    """Of a GPU's bytes, those that may be planned with."""
    return int(memory * (1 - SPARE))


@dataclass(frozen=True)
class Choice:
    """What `auto` takes.

    Args:
        layout: how the model is spread.
        micro_batch: images that a device holds at once.
        checkpointing: whether blocks are recomputed.
        needed: estimated bytes of each device; 0 on a CPU.
        usable: bytes that the smallest GPU has for it.
        reasons: a line each, from the first thing tried to what was taken.
    """

    layout: Layout
    micro_batch: int
    checkpointing: bool
    needed: int
    usable: int
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable or not self.usable

    def settings(self) -> dict[str, Any]:
        """The keys of a recipe's `strategy` section that were decided."""
        decided: dict[str, Any] = {
            "name": self.layout.kind,
            "micro_batch": self.micro_batch,
            "checkpointing": self.checkpointing,
        }
        if self.layout.kind != "single":
            decided["devices"] = self.layout.devices
        if self.layout.nodes > 1:
            decided["nodes"] = self.layout.nodes
        if self.layout.kind == "fsdp":
            decided["offload"] = self.layout.offload_weights
        return decided


@dataclass(frozen=True)
class _Rung:
    layout: Layout
    micro_batch: int
    checkpointing: bool

    def __str__(self) -> str:
        recomputed = ", checkpointing" if self.checkpointing else ""
        return f"{self.layout}, micro-batch {self.micro_batch}{recomputed}"


def choose_strategy(recipe: Recipe, machine: Machine, num_classes: int, *, plan: Plan | None = None) -> Choice:
    """The first rung of the ladder that fits. Decides only what the recipe leaves open.

    Args:
        recipe: its strategy is `auto` (a `micro_batch` or `checkpointing` given with it stays); precision resolved.
        machine: its GPUs, of which the smallest decides, and who started the processes, if somebody did.
        num_classes: outputs of the head.
        plan: of an earlier call with the same recipe.

    Raises:
        UserError: as `build_model` does; CapabilityError where memory cannot be estimated.
    """
    strategy = recipe.strategy
    on_gpu = bool(machine.gpus) and strategy.accelerator != "cpu"
    devices, nodes = (max(1, len(machine.gpus)), 1) if on_gpu else (1, 1)
    if machine.launch is not None:
        devices, nodes = machine.launch.per_node, machine.launch.nodes
    share = max(1, recipe.data.batch_size // (devices * nodes))
    given = strategy.micro_batch
    if not on_gpu:
        checkpointing = strategy.checkpointing
        plain = _plain(devices, nodes)
        reasons = (f"{plain}: no GPU is used, so nothing is estimated",)
        return Choice(plain, given or share, checkpointing, 0, 0, reasons)
    plan = Plan(recipe, num_classes) if plan is None else plan
    room = usable(min(gpu.memory for gpu in machine.gpus))
    open_checkpointing = "checkpointing" not in strategy.model_fields_set
    sizes = [given] if given else _divisors(share)
    busy = _busy(plan, machine, sizes)

    tried: list[str] = []
    last = None
    cannot = _cannot_shard(recipe)
    for rung in _ladder((devices, nodes), sizes, busy, open_checkpointing, strategy.checkpointing):
        if rung.layout.kind == "fsdp" and cannot:
            continue
        accumulate = max(1, share // rung.micro_batch)
        needed = plan.estimate(
            rung.layout, rung.micro_batch, checkpointing=rung.checkpointing, accumulate=accumulate
        ).total
        last = rung, needed
        if needed <= room:
            tried.append(f"{rung}: about {size(needed)} of {size(room)} usable")
            return Choice(rung.layout, rung.micro_batch, rung.checkpointing, needed, room, tuple(tried))
        tried.append(f"{rung}: would need about {size(needed)}, and {size(room)} are usable")
    assert last is not None, "the ladder has a first rung"
    rung, needed = last
    if cannot:
        tried.append(f"fsdp is left out: {cannot}")
    tried.append("nothing fits: take a smaller image or model, or GPUs with more memory")
    return Choice(rung.layout, rung.micro_batch, rung.checkpointing, needed, room, tuple(tried))


def _plain(devices: int, nodes: int) -> Layout:
    return Layout("ddp", devices, nodes) if devices * nodes > 1 else Layout()


def _cannot_shard(recipe: Recipe) -> str:
    """Why `fsdp` would be refused whatever the machine; empty if it would not."""
    problems = fsdp_problems(recipe.model_copy(update={"strategy": FsdpConfig()}))
    return "; ".join(f"{problem.path} {problem.message}" for problem in problems)


def _ladder(
    shape: tuple[int, int], sizes: list[int], busy: int, open_checkpointing: bool, given: bool
) -> Iterator[_Rung]:
    """Rungs in the order of the module's text. `sizes` fall; `busy` is the smallest that keeps a GPU at work."""
    plain, shards = _plain(*shape), Layout("fsdp", *shape)
    options = (False, True) if open_checkpointing else (given,)
    large = [n for n in sizes if n >= busy] or sizes[:1]
    small = [n for n in sizes if n not in large]
    for checkpointing in options:
        yield from (_Rung(plain, n, checkpointing) for n in large)
    if plain.world > 1:
        for checkpointing in options:
            yield from (_Rung(shards, n, checkpointing) for n in large)
    yield from (_Rung(plain, n, options[-1]) for n in small)
    if plain.world > 1:
        yield from (_Rung(shards, n, options[-1]) for n in small)
    away = Layout("fsdp", *shape, offload_states=True, offload_weights=True)
    yield from (_Rung(away, n, options[-1]) for n in (*large[-1:], *small))


def _divisors(number: int) -> list[int]:
    """From the largest down, each at most about half the one before: few enough to try them all."""
    found = [number]
    for candidate in range(number // 2, 0, -1):
        if number % candidate == 0 and candidate <= 0.6 * found[-1]:
            found.append(candidate)
    return found


def _busy(plan: Plan, machine: Machine, sizes: list[int]) -> int:
    """The fewest images whose arithmetic takes a GPU as long as it takes to launch it."""
    kinds = [kind_of(gpu.name) or H200 for gpu in machine.gpus]
    fastest = max(kinds, key=lambda kind: kind.half)
    probe = min(sizes[0], 8)
    _, work = plan.count(probe, checkpointing=False, narrow=False)
    each = compute_seconds(work, fastest, compiled=True) / probe  # of the arithmetic alone
    launch = work.launches * (ADAPTED if plan.built.report.adapters else LAUNCH)
    return max(1, round(launch / each))
