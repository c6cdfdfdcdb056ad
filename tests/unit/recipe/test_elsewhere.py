"""A run's recipe on another number of processes: what was decided for the machine that it began on gives way."""

from __future__ import annotations

from pathlib import Path

import pytest

from vit_efficient.machine import Gpu, Launch, Machine
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.elsewhere import move
from vit_efficient.recipe.load import dump_recipe, load_recipe
from vit_efficient.recipe.schema import Recipe

A100 = Gpu("NVIDIA A100", (8, 0), 80 << 30)
CPU = Machine(cores=2)


def on(gpus: int, launch: Launch | None = None) -> Machine:
    return Machine((A100,) * gpus, "580.1", 64, {}, launch)


def goes_on(folder: Path, began: Machine, words: tuple[str, ...], now: Machine, *later: str) -> tuple[Recipe, str]:
    """The recipe of a run that began on one machine, as `fit --resume RUN ...` has it on another; and its notes."""
    first, _ = resolve(load_recipe("fp32_sdpa", ("data.batch_size=128", *words)).recipe, began)
    assert check(first, began) == []
    (folder / "recipe.yaml").write_text(dump_recipe(first))
    recipe, notes = move(load_recipe(str(folder / "recipe.yaml"), later), now)
    assert check(recipe, now) == []
    return resolve(recipe, now)[0], "\n".join(notes)


@pytest.mark.parametrize(
    ("began", "words", "now", "later", "name", "shape", "micro"),
    [
        (on(2), ("strategy=fsdp",), on(4), ("strategy=fsdp", "strategy.devices=4"), "fsdp", (4, 1), 32),
        (on(4), ("strategy=fsdp",), on(2), (), "fsdp", (2, 1), 32),
        (on(4), ("strategy=fsdp",), on(4), ("strategy.devices=2",), "fsdp", (2, 1), 32),
        (on(2), ("strategy=fsdp",), on(4), ("strategy.devices=auto",), "fsdp", (4, 1), 32),
        (on(2), (), on(1, Launch("srun", 8, 2, 4)), (), "ddp", (4, 2), 16),
        (on(1, Launch("srun", 8, 2, 4)), (), on(4), (), "ddp", (4, 1), 16),
        (CPU, (), Machine(launch=Launch("torchrun", 2)), (), "ddp", (2, 1), 64),
        (CPU, ("strategy=ddp", "strategy.devices=2"), CPU, ("strategy=single",), "single", (1, 1), 128),
        (CPU, ("strategy=ddp", "strategy.devices=2"), Machine(launch=Launch("torchrun", 1)), (), "ddp", (1, 1), 64),
        (on(2), ("strategy.micro_batch=64",), on(8), ("strategy.devices=8",), "ddp", (8, 1), 16),
        (on(4), (), on(3), ("strategy.devices=2",), "ddp", (2, 1), 32),
    ],
)
def test_other_numbers_of_processes(
    began: Machine, words: tuple[str, ...], now: Machine, later: tuple[str, ...], name: str, shape: tuple[int, int],
    micro: int, tmp_path: Path,
) -> None:  # fmt: skip
    """With no word about micro-batches; a device never holds more images than it did, where the strategy stays."""
    recipe, _ = goes_on(tmp_path, began, words, now, *later)
    strategy = recipe.strategy
    assert (strategy.name, strategy.micro_batch) == (name, micro)
    assert (getattr(strategy, "devices", 1), getattr(strategy, "nodes", 1)) == shape


def test_what_changed_is_said(tmp_path: Path) -> None:
    _, said = goes_on(tmp_path, on(2), ("strategy=fsdp",), on(1, Launch("srun", 4, 1, 4)))
    assert said.splitlines() == [
        "strategy.devices = 4 instead of 2: as srun started them",
        "strategy.micro_batch = 32 instead of 64: each of 4 devices has 32 images of a step",
    ]


def test_nothing_changes_where_nothing_must(tmp_path: Path) -> None:
    """A micro-batch that still divides stays, and so does a run on CPUs of a machine with GPUs."""
    words = ("strategy=ddp", "strategy.devices=2", "strategy.accelerator=cpu", "strategy.micro_batch=16")
    recipe, said = goes_on(tmp_path, CPU, words, on(4))
    assert said == ""
    assert (recipe.strategy.accelerator, recipe.strategy.micro_batch) == ("cpu", 16)


def test_the_command_line_stays(tmp_path: Path) -> None:
    recipe, _ = goes_on(tmp_path, on(2), (), on(4), "strategy.devices=4", "strategy.micro_batch=8")
    assert recipe.strategy.micro_batch == 8
    with pytest.raises(AssertionError, match=r"does not divide the 32 images"):
        goes_on(tmp_path, on(2), (), on(4), "strategy.devices=4", "strategy.micro_batch=64")
    with pytest.raises(AssertionError, match=r"is 2, and torchrun starts 1 node x 4 processes"):
        goes_on(tmp_path, on(2), (), on(4, Launch("torchrun", 4)), "strategy.devices=2")
    with pytest.raises(AssertionError, match=r"is single, one process, and torchrun starts"):
        goes_on(tmp_path, on(2), (), on(4, Launch("torchrun", 4)), "strategy=single")


def test_parts_become_a_file_where_the_strategy_writes_one(tmp_path: Path) -> None:
    words = ("strategy=fsdp", "checkpoint.sharded=true")
    recipe, said = goes_on(tmp_path, on(2), words, on(2), "strategy=ddp")
    assert not recipe.checkpoint.sharded
    assert "checkpoint.sharded = false instead of true: under strategy=ddp a checkpoint is one file" in said
    recipe, said = goes_on(tmp_path, on(2), words, on(4), "strategy.devices=4")
    assert recipe.checkpoint.sharded
    assert "sharded" not in said


def test_a_run_on_gpus_does_not_go_on_without_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"is gpu, and there is no GPU that torch can use"):
        goes_on(tmp_path, on(2), (), CPU)
