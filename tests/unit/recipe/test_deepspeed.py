"""What DeepSpeed does not work with is refused when the recipe is loaded, with what to take instead."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vit_efficient.machine import Gpu, Machine
from vit_efficient.recipe.compat import caveats, check
from vit_efficient.recipe.load import load_recipe

PACKAGES = {"bitsandbytes": "0.50.2", "peft": "0.21.2", "deepspeed": "0.19.8"}
NODE = Machine((Gpu("NVIDIA A100", (8, 0), 40 << 30),) * 2, "580.1", 16, PACKAGES)
RANGES = ("quantization.activations=static", "quantization.learn_scales=true", "quantization.freeze_ranges=0.3")


def problems(machine: Machine, *words: str, variant: str = "int8_sdpa") -> dict[str, str]:
    recipe = load_recipe(variant, ("strategy=deepspeed", *words)).recipe
    return {each.path: each.message for each in check(recipe, machine)}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("variant", ["fp32_sdpa", "int8_sdpa", "int8_static_sdpa", "lora_sdpa", "int4_sdpa"])
def test_what_works(variant: str, stage: int) -> None:
    assert problems(NODE, f"strategy.stage={stage}", "quantization.precision=bf16", variant=variant) == {}


@pytest.mark.parametrize(
    ("words", "path", "instead"),
    [
        (("strategy.accelerator=cpu",), "strategy.name", "strategy=fsdp"),
        (("strategy.offload_parameters=true",), "strategy.offload_parameters", "strategy.stage=3"),
        (("strategy.compile=true", "strategy.stage=3"), "strategy.compile", "strategy=fsdp"),
        (("optim.name=adamw8bit",), "optim.name", "optim.name=adamw"),
        (RANGES, "quantization.freeze_ranges", "quantization.freeze_ranges=0"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], path: str, instead: str) -> None:
    found = problems(NODE, *words)
    assert list(found) == [path]
    assert instead in found[path]


def test_the_package_is_missing() -> None:
    bare = replace(NODE, packages={k: v for k, v in PACKAGES.items() if k != "deepspeed"})
    assert "pip install -e '.[deepspeed]'" in problems(bare)["strategy.name"]


def test_offloaded_parameters_of_stage_3() -> None:
    assert problems(NODE, "strategy.stage=3", "strategy.offload_parameters=true") == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy.stage=3",), True),
        (("strategy.stage=3", "strategy.checkpointing=true"), False),
        (("strategy.stage=3", "quantization.precision=fp32"), False),
        (("strategy.stage=2",), False),
    ],
)
def test_caveat_of_stage_3(words: tuple[str, ...], said: bool) -> None:
    lines = caveats(load_recipe("int8_sdpa", ("strategy=deepspeed", *words)).recipe, NODE)
    assert any("ZeRO 3" in line for line in lines) == said
