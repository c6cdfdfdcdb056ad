"""`strategy: auto` on machines that are not here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vit_efficient.machine import Gpu, Launch, Machine
from vit_efficient.measure.choose import Choice, choose_strategy
from vit_efficient.measure.layout import Layout, Weights
from vit_efficient.measure.memory import Estimate, Plan
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), 15_828_320_256),
    "4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25_250_627_584),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 42_298_834_944),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 85_097_971_712),
    "h200": Gpu("NVIDIA H200", (9, 0), 150_109_880_320),
}


def recipe_of(*words: str) -> Recipe:
    return load_recipe("fp32_sdpa", ["quantization.precision=bf16", "data.batch_size=256", *words]).recipe


class Larger(Plan):
    """A small model's plan, as if it were so many times as large: what is counted is real, its size is not."""

    def __init__(self, recipe: Recipe, weights: float, activations: float) -> None:
        super().__init__(recipe, 10)
        self.weights_factor, self.activations_factor = weights, activations

    def weights(self, layout: Layout) -> Weights:
        own = super().weights(layout)
        scaled = Weights(*(round(self.weights_factor * part) for part in vars(own).values()))
        large = self.weights_factor > 1  # blocks of which each is a unit, and which do not stay gathered
        return replace(scaled, unit=scaled.block, kept=0, unit_trained=scaled.block_trained) if large else scaled

    def estimate(self, layout: Layout, micro_batch: int, *, checkpointing: bool, accumulate: int = 1) -> Estimate:
        own = super().estimate(layout, micro_batch, checkpointing=checkpointing, accumulate=accumulate)
        return replace(own, activations=round(self.activations_factor * own.activations))


def choose(name: str, count: int, plan: Plan) -> Choice:
    return choose_strategy(plan.recipe, Machine((GPUS[name],) * count), 10, plan=plan)


@pytest.fixture(scope="module")
def large() -> Plan:
    """Activations of 76 GB with 256 images, as a large ViT has; small weights."""
    return Larger(recipe_of(), 1, 250)


@pytest.fixture(scope="module")
def heavy() -> Plan:
    """Weights and states that fit no GPU whole."""
    return Larger(recipe_of(), 2000, 1)


def test_the_whole_share_of_the_batch_where_it_fits(large: Plan) -> None:
    choice = choose("h200", 1, large)
    assert choice.settings() == {"name": "single", "micro_batch": 256, "checkpointing": False}
    assert len(choice.reasons) == 1
    assert choose("h200", 8, large).settings() == {
        "name": "ddp", "micro_batch": 32, "checkpointing": False, "devices": 8,
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("name", GPUS)
def test_what_is_chosen_fits_and_divides_the_batch(name: str, count: int, large: Plan) -> None:
    choice = choose(name, count, large)
    assert choice.fits
    assert choice.needed <= choice.usable < GPUS[name].memory
    assert 256 // count % choice.micro_batch == 0
    assert choice.layout.kind == ("single" if count == 1 else "ddp"), "sharding does not help activations"


def test_a_smaller_gpu_never_takes_more(large: Plan) -> None:
    """Smaller micro-batches or checkpointing, in the order of memory."""
    micro = [choose(name, 1, large) for name in ("t4", "4090", "a100-40", "a100", "h200")]
    plain = [choice.micro_batch for choice in micro if not choice.checkpointing]
    assert plain == sorted(plain)
    assert [choice.checkpointing for choice in micro] == sorted((c.checkpointing for c in micro), reverse=True)


def test_weights_that_fit_no_device_are_sharded_and_then_offloaded(heavy: Plan) -> None:
    assert choose("h200", 8, heavy).layout.kind == "ddp"
    assert choose("a100-40", 8, heavy).layout == Layout("fsdp", 8)
    away = choose("4090", 2, heavy)
    assert away.layout.offload_weights
    assert away.settings()["offload"]
    assert "would need" in away.reasons[0]
    assert "usable" in away.reasons[-1]


def test_shards_go_over_all_nodes_that_were_started(heavy: Plan) -> None:
    job = Machine((GPUS["a100-40"],), launch=Launch("srun", 8, 2, 4))
    choice = choose_strategy(heavy.recipe, job, 10, plan=heavy)
    assert choice.layout == Layout("fsdp", 4, 2)
    assert choice.settings() == {
        "name": "fsdp", "micro_batch": 32, "checkpointing": False, "devices": 4, "nodes": 2, "offload": False,
    }  # fmt: skip


def test_shards_are_not_taken_where_they_would_be_refused() -> None:
    """bitsandbytes' optimizer does not step sharded parameters."""
    plan = Larger(recipe_of("optim.name=adamw8bit"), 4000, 1)
    choice = choose("a100-40", 8, plan)
    assert choice.layout.kind == "ddp"
    assert not choice.fits
    assert "fsdp is left out: optim.name is adamw8bit" in choice.reasons[-2]


def test_nothing_fits() -> None:
    plan = Larger(recipe_of("strategy.micro_batch=256", "strategy.checkpointing=true"), 1, 10_000)
    choice = choose("t4", 1, plan)
    assert not choice.fits
    assert choice.reasons[-1].startswith("nothing fits")


def test_what_the_user_set_stays(large: Plan) -> None:
    words = ("strategy.micro_batch=64", "strategy.checkpointing=false")
    plan = Larger(recipe_of(*words), 1, 250)
    choice = choose("t4", 1, plan)
    assert (choice.micro_batch, choice.checkpointing) == (64, False)


def test_checkpointing_comes_once_micro_batches_cannot_be_made_smaller() -> None:
    plan = Larger(recipe_of("strategy.micro_batch=128"), 1, 250)
    assert choose("4090", 1, plan).checkpointing
    assert not choose("h200", 1, plan).checkpointing


def test_no_gpu_no_estimate() -> None:
    choice = choose_strategy(recipe_of(), Machine(cores=2), 10)
    assert (choice.layout, choice.needed, choice.fits) == (Layout(), 0, True)
