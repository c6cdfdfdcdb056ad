"""`strategy: auto` in a recipe, on machines that are not here: the real estimate of a small model decides."""

from __future__ import annotations

import pytest

from vit_efficient.engine.settle import settle_strategy
from vit_efficient.machine import Gpu, Launch, Machine
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

PACKAGES = {"bitsandbytes": "0.50.2", "peft": "0.21.2"}


def gpus(gib: float, count: int = 1) -> tuple[Gpu, ...]:
    return (Gpu("NVIDIA A100", (8, 0), int(gib * 2**30)),) * count


def recipe(*words: str, batch: int = 512) -> Recipe:
    return load_recipe("fp32_sdpa", (f"data.batch_size={batch}", *words)).recipe


def test_a_large_gpu_takes_the_whole_batch_at_once() -> None:
    settled, lines = settle_strategy(recipe(), Machine(gpus(80), packages=PACKAGES))
    strategy = settled.strategy
    assert (strategy.name, strategy.micro_batch, strategy.checkpointing) == ("single", 512, False)
    assert len(lines) == 1
    assert "single, micro-batch 512: about" in lines[0]


def test_a_small_one_saves_memory_and_says_what_was_tried() -> None:
    machine = Machine(gpus(1.2), packages=PACKAGES)
    settled, lines = settle_strategy(recipe(), machine)
    assert "would need about" in lines[0]
    assert len(lines) > 1
    strategy = settled.strategy
    assert strategy.micro_batch < 512 or strategy.checkpointing
    assert check(settled, machine) == []
    assert resolve(settled, machine)[0].strategy.micro_batch == strategy.micro_batch


def test_several_gpus_share_the_batch() -> None:
    settled, _ = settle_strategy(recipe(), Machine(gpus(80, 4), packages=PACKAGES))
    assert (settled.strategy.name, settled.strategy.devices, settled.strategy.micro_batch) == ("ddp", 4, 128)


def test_what_was_given_stays() -> None:
    given = recipe("strategy.micro_batch=64", "strategy.checkpointing=true", "strategy.compile=true")
    strategy = settle_strategy(given, Machine(gpus(80), packages=PACKAGES))[0].strategy
    assert (strategy.micro_batch, strategy.checkpointing, strategy.compile) == (64, True, True)


@pytest.mark.parametrize("visible", [1, 4])  # bound to one GPU each (--gpus-per-task=1), and not
@pytest.mark.parametrize("nodes", [1, 2])
def test_what_srun_started_is_taken_and_the_rest_decided(nodes: int, visible: int) -> None:
    """Memory counts there as anywhere; the number of processes is what was started, not what one of them sees."""
    job = Machine(gpus(1.2, visible), packages=PACKAGES, launch=Launch("srun", 4 * nodes, nodes, 4, 8))
    settled, lines = settle_strategy(recipe(batch=4096), job)
    strategy = settled.strategy
    assert (strategy.name, strategy.devices, strategy.nodes) == ("ddp", 4, nodes)
    assert "would need about" in lines[0]
    assert strategy.micro_batch < 4096 // (4 * nodes) or strategy.checkpointing
    assert check(settled, job) == []


def test_one_process_by_torchrun_is_one() -> None:
    job = Machine(gpus(80, 4), packages=PACKAGES, launch=Launch("torchrun", 1))
    settled, _ = settle_strategy(recipe(), job)
    assert settled.strategy.name == "single"
    assert check(settled, job) == []


@pytest.mark.parametrize(
    ("words", "machine"),
    [
        (("strategy=ddp",), Machine(gpus(1, 2))),
        ((), Machine()),
        (("strategy.accelerator=cpu",), Machine(gpus(80))),
    ],
)
def test_elsewhere_nothing_is_decided(words: tuple[str, ...], machine: Machine) -> None:
    given = recipe(*words)
    assert settle_strategy(given, machine) == (given, [])
