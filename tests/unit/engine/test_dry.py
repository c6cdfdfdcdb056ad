"""`fit --dry-run` on machines that are not here, and without data."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from vit_efficient.engine.dry import dry_run
from vit_efficient.machine import PACKAGES, Gpu, Machine
from vit_efficient.measure.memory import estimate_recipe
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe

A100 = Machine((Gpu("NVIDIA A100", (8, 0), 80 << 30),), "580.1", 16, dict.fromkeys(PACKAGES, "installed"))
SMALL = ("model.kwargs.depth=1", "data.batch_size=64", "strategy.micro_batch=8")


def shown(machine: Machine, *words: str) -> str:
    recipe, _ = resolve(load_recipe("fp32_sdpa", (*SMALL, *words)).recipe, machine)
    text = io.StringIO()
    dry_run(recipe, machine, check(recipe, machine, trains=True), Console(file=text, width=160))
    return text.getvalue()


@pytest.mark.parametrize(
    ("protocol", "classes"), [("imagenet_vit_l16", "1,000"), ("tiny_imagenet", "200"), ("folder", "1,000")]
)
def test_sizes_and_memory_without_data(protocol: str, classes: str) -> None:
    text = shown(A100, f"protocol={protocol}")
    assert f"taken to be {classes}: the data is not there" in text
    assert "parameters" in text
    assert "estimated GPU memory" in text
    assert "data.shards: is not set" in text
    assert text.count("data.shards: is not set") == 1


def test_a_number_of_classes_that_is_given() -> None:
    text = shown(A100, "protocol=imagenet_vit_l16", "model.num_classes=7")
    assert "taken to be" not in text
    assert "estimated GPU memory" in text


def test_a_gpu_that_is_nearly_full_or_too_small() -> None:
    words = ("protocol=digits", "strategy=single")
    recipe, _ = resolve(load_recipe("fp32_sdpa", (*SMALL, *words)).recipe, A100)
    needed = estimate_recipe(recipe, 10).total

    def on(memory: float) -> str:
        return shown(replace(A100, gpus=(replace(A100.gpus[0], memory=int(memory)),)), *words)

    assert "it may not fit" not in on(needed / 0.9)
    nearly = on(needed / 0.95)
    assert "it may not fit" in nearly
    assert "This machine can run it." in nearly
    assert "lower `strategy.micro_batch`" in on(needed / 1.05)
