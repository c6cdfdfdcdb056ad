"""The predictions that pages print, against what `submit --estimate` gives for the words that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vit_efficient.measure.estimate import machine_of, placed
from vit_efficient.measure.forecast import forecast
from vit_efficient.measure.gpus import gpu_kind
from vit_efficient.measure.known import classes_of
from vit_efficient.measure.memory import Plan
from vit_efficient.recipe.load import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.long]
DOCS = Path(__file__).parents[3] / "docs"
VIT_L = ("protocol=imagenet_vit_l16", "quantization.precision=bf16", "strategy.compile=true")
SHARE = 0.02  # that a page may be off: other versions of torch and timm count a little otherwise


def rows(page: str, after: str) -> Iterator[list[str]]:
    """The cells of the first table behind a text, its head left out."""
    lines = iter((DOCS / page).read_text().partition(after)[2].splitlines())
    for line in lines:
        if line.startswith("|---"):
            break
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


class Estimates:
    """Forecasts that share their counts where all but the layout is the same."""

    def __init__(self, name: str, *words: str) -> None:
        self.name, self.words = name, words
        self.plan: Plan | None = None

    def of(self, gpu: str, shape: tuple[int, int], *words: str) -> tuple[float, float, float]:
        """GiB of each, images a second, hours."""
        recipe = load_recipe(self.name, [*self.words, *words]).recipe
        self.plan = Plan(recipe, classes_of(recipe)) if self.plan is None else self.plan
        kind = gpu_kind(gpu)
        found = forecast(placed(recipe, shape), machine_of(kind, shape), kind, plan=self.plan)
        return found.memory / 2**30, found.images_per_second, found.hours


def close(printed: list[str], found: tuple[float, ...], digits: int = 1) -> None:
    """Within 2 %, or half of the last digit that is printed."""
    for cell, value in zip(printed, found, strict=True):
        assert number(cell) == pytest.approx(value, rel=SHARE, abs=0.51 * 10**-digits), (printed, found)


def test_nodes_under_slurm() -> None:
    kinds = {"H200": "h200", "A100, 80 GB": "a100", "A100, 40 GB": "a100-40"}
    estimates = Estimates("fp32_sdpa", *VIT_L)
    found = list(rows("run/slurm.md", "50 epochs: predicted"))
    assert len(found) == 6
    for gpu, where, _, *figures in found:
        nodes, each = map(int, where.split(" x "))
        memory, speed, hours = estimates.of(kinds[gpu], (nodes, each))
        close(figures, (memory, speed, hours, hours * nodes * each))


def test_numbers_of_gpus() -> None:
    words = ("data.batch_size=2048", "strategy=ddp", "strategy.micro_batch=128")
    estimates = Estimates("fp32_sdpa", *VIT_L, *words)
    found = list(rows("scaling.md", "The recipe holds the *global* batch"))
    assert len(found) == 6
    for gpus, _, printed_memory, printed_speed, _, printed_hours, _ in found:
        count = int(number(gpus))
        close([printed_memory, printed_speed, printed_hours],
              estimates.of("h200", (max(1, count // 8), min(8, count))))  # fmt: skip


@pytest.mark.parametrize(("depth", "place"), [("mask", 1), ("subset", 3)])
def test_one_node(depth: str, place: int) -> None:
    numbers = {"one": 1, "two": 2, "four": 4, "eight": 8}
    estimates = Estimates("fp32_sdpa", *VIT_L, "optim.ema=null", f"model.stochastic_depth={depth}")
    found = list(rows("run/one_node.md", "Predicted by `submit --estimate`"))
    assert len(found) == 6
    for cells in found:
        count = next(numbers[word] for word in re.findall(r"\w+", cells[0]) if word in numbers)
        strategy = "fsdp" if cells[0].startswith("FSDP2") else "ddp" if count > 1 else "single"
        words = (f"strategy={strategy}", "strategy.micro_batch=128", f"data.batch_size={128 * count}")
        memory, speed, _ = estimates.of("h200", (1, count), *words)
        close(cells[place : place + 2], (memory, speed / count))


def test_a_t4() -> None:
    estimates = Estimates("int4_sdpa", "protocol=imagenet_vit_l16", "quantization.precision=fp16", "strategy=single")
    found = list(rows("run/t4.md", "Memory and speed: predicted"))
    assert len(found) == 2
    for images, recomputed, *figures in found:
        words = (
            f"strategy.micro_batch={images}",
            f"strategy.checkpointing={'true' if recomputed == 'yes' else 'false'}",
        )
        close(figures, estimates.of("t4", (1, 1), *words)[:2])
