"""What FSDP2 does not work with is refused when the recipe is read, with the nearest thing that works."""

from __future__ import annotations

import pytest

from vit_efficient.machine import Gpu, Machine
from vit_efficient.recipe.compat import check, resolve
from vit_efficient.recipe.load import load_recipe

A100 = Gpu("NVIDIA A100", (8, 0), 40 << 30)
NODE = Machine((A100,) * 4, "580.1", 64, {"bitsandbytes": "0.50.2", "peft": "0.21.2"})


def problems(*words: str, variant: str = "fp32_sdpa") -> dict[str, str]:
    recipe = load_recipe(variant, words).recipe
    return {problem.path: str(problem) for problem in check(recipe, NODE)}


@pytest.mark.parametrize(
    ("words", "key", "instead"),
    [
        (("strategy=fsdp", "quantization.precision=fp16"), "quantization.precision", "Take strategy=ddp"),
        (("strategy=fsdp", "optim.name=adamw8bit"), "optim.name", "Take adamw"),
        (("strategy=fsdp", "strategy.shard=hybrid"), "strategy.shard", "Take full"),
        (("strategy=ddp", "checkpoint.sharded=true"), "checkpoint.sharded", "Take strategy=fsdp"),
    ],
)
def test_refused_with_the_nearest_that_works(words: tuple[str, ...], key: str, instead: str) -> None:
    found = problems(*words)
    assert list(found) == [key]
    assert instead in found[key]


@pytest.mark.parametrize(
    "variant", ["fp32_sdpa", "int8_sdpa", "int8_static_sdpa", "int4_sdpa", "lora_sdpa", "w4a8_sdpa"]
)
def test_shipped_variants_shard(variant: str) -> None:
    assert problems("strategy=fsdp", "checkpoint.sharded=true", variant=variant) == {}


def test_devices_are_those_of_the_machine() -> None:
    recipe, notes = resolve(load_recipe("fp32_sdpa", ["strategy=fsdp"]).recipe, NODE)
    assert recipe.strategy.name == "fsdp"
    assert recipe.strategy.devices == 4
    assert recipe.strategy.micro_batch == recipe.data.batch_size // 4
    assert any(note.startswith("strategy.devices = 4") for note in notes)
