"""What a recipe and the processes that srun or torchrun started must agree on."""

from __future__ import annotations

import pytest

from vit_efficient.machine import Gpu, Launch, Machine
from vit_efficient.recipe.compat import check, devices, resolve
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

A100 = Gpu("NVIDIA A100", (8, 0), 40 << 30)


def recipe(*words: str) -> Recipe:
    return load_recipe("fp32_sdpa", words).recipe


def job(nodes: int, per_node: int, visible: int, *, cores: int | None = None) -> Machine:
    """What one process of a Slurm job with a GPU for each finds."""
    return Machine((A100,) * visible, "580.1", 64, {}, Launch("srun", nodes * per_node, nodes, per_node, cores))


@pytest.mark.parametrize("visible", [1, 4])  # bound to one GPU each (--gpus-per-task=1), and not
def test_a_process_for_each_gpu(visible: int) -> None:
    """The GPUs that a single process happens to see do not count."""
    machine = job(2, 4, visible)
    for words in ((), ("strategy=ddp", "strategy.nodes=2"), ("strategy=ddp", "strategy.nodes=2", "strategy.devices=4")):
        assert check(recipe(*words), machine) == []
        found, _ = resolve(recipe(*words), machine)
        assert found.strategy.name == "ddp"
        assert devices(found.strategy) == (4, 2)
        assert found.strategy.micro_batch == 64 // 8


def test_cores_are_those_of_the_process() -> None:
    assert resolve(recipe(), job(1, 4, 4, cores=6))[0].data.workers == 5
    assert resolve(recipe(), job(1, 4, 4))[0].data.workers == 8  # 64 / 4, at most 8


@pytest.mark.parametrize(
    ("words", "path", "said"),
    [
        (("strategy=ddp",), "strategy.nodes", "is 1, and srun starts 2 nodes x 4 processes"),
        (("strategy=ddp", "strategy.devices=2", "strategy.nodes=2"), "strategy.devices", "is 2, and srun starts"),
        (("strategy=single",), "strategy.name", "is single, one process, and srun starts 2 nodes x 4 processes"),
    ],
)
def test_mismatch(words: tuple[str, ...], path: str, said: str) -> None:
    (problem,) = check(recipe(*words), job(2, 4, 4))
    assert problem.path == path
    assert said in problem.message


def test_uneven_nodes() -> None:
    (problem,) = check(recipe("strategy=ddp", "strategy.nodes=2"), Machine(launch=Launch("srun", 3, 2)))
    assert "3 processes on 2 nodes, not equally many on each" in problem.message


def test_fewer_gpus_than_processes() -> None:
    machine = Machine((A100,) * 2, "580.1", 64, {}, Launch("srun", 4, 1, 2))
    (problem,) = check(recipe("strategy=ddp"), machine)
    assert (problem.path, problem.message) == ("strategy.devices", "is 4, and the job has 2 GPUs on each node")
