"""Open choices made concrete, and the reasons why a recipe cannot run, on machines described by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_efficient.machine import Gpu, Launch, Machine
from vit_efficient.recipe.compat import caveats, check, devices, resolve
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

PACKAGES = {"bitsandbytes": "0.50.2", "peft": "0.21.2", "flash-attn": "2.8.3"}
T4 = Gpu("Tesla T4", (7, 5), 16 << 30)
A100 = Gpu("NVIDIA A100", (8, 0), 40 << 30)
V100 = Gpu("Tesla V100", (7, 0), 16 << 30)
CPU = Machine(cores=2, packages=PACKAGES)
TRAINER = Machine(cores=2, packages={**PACKAGES, "torchao": "0.18.0"})
ONE_T4 = Machine((T4,), "535.1", 8, PACKAGES)
NODE = Machine((A100,) * 4, "580.1", 64, PACKAGES)


def recipe(*words: str, variant: str = "int8_sdpa") -> Recipe:
    return load_recipe(variant, words).recipe


def problems(machine: Machine, *words: str, variant: str = "int8_sdpa") -> dict[str, str]:
    return {each.path: each.message for each in check(recipe(*words, variant=variant), machine)}


@pytest.mark.parametrize(
    ("machine", "accelerator", "strategy", "micro_batch", "precision", "workers"),
    [
        (CPU, "cpu", "single", 64, "fp32", 1),
        (Machine(cores=1), "cpu", "single", 64, "fp32", 0),
        (Machine(cores=4), "cpu", "single", 64, "fp32", 3),
        (ONE_T4, "gpu", "single", 64, "fp16", 7),
        (NODE, "gpu", "ddp", 16, "bf16", 8),
        (Machine((A100, T4), "", 8), "gpu", "ddp", 32, "fp16", 3),  # the oldest one decides
    ],
)
def test_resolve(
    machine: Machine, accelerator: str, strategy: str, micro_batch: int, precision: str, workers: int
) -> None:
    found, notes = resolve(recipe(), machine)
    assert (found.strategy.accelerator, found.strategy.name) == (accelerator, strategy)
    assert found.strategy.micro_batch == micro_batch
    assert found.quantization.precision == precision
    assert found.data.workers == workers
    assert devices(found.strategy) == (max(1, len(machine.gpus)), 1)
    decided = [
        "strategy.accelerator",
        "strategy.name",
        "strategy.micro_batch",
        "quantization.precision",
        "data.workers",
    ]
    assert [note.partition(" = ")[0] for note in notes] == decided


def test_resolve_leaves_alone_what_was_said() -> None:
    words = ["strategy=ddp", "strategy.devices=2", "strategy.accelerator=gpu", "strategy.micro_batch=8"]
    asked = recipe(*words, "quantization.precision=fp16", "data.workers=0")
    assert resolve(asked, NODE) == (asked, [])


def test_auto_keeps_the_other_keys_of_strategy() -> None:
    found, _ = resolve(recipe("strategy.checkpointing=true", "strategy.micro_batch=4"), NODE)
    assert (found.strategy.name, found.strategy.checkpointing, found.strategy.micro_batch) == ("ddp", True, 4)


@pytest.mark.parametrize("machine", [CPU, ONE_T4, NODE])
@pytest.mark.parametrize("words", [[], ["strategy=ddp"], ["strategy.accelerator=gpu"], ["data.batch_size=7"]])
def test_resolve_twice_is_resolve_once(machine: Machine, words: list[str]) -> None:
    once, _ = resolve(recipe(*words), machine)
    assert resolve(once, machine) == (once, [])


def test_what_runs_has_no_problems() -> None:
    for variant in ("fp32_sdpa", "int8_sdpa", "int4_sdpa", "lora_sdpa"):
        for machine in (CPU, ONE_T4, NODE):
            assert problems(machine, variant=variant) == {}
    assert problems(NODE, variant="int8_flash2") == {}


def test_flash2_needs_a_gpu_of_its_time_and_its_package() -> None:
    assert "on the CPU" in problems(CPU, variant="int8_flash2")["attention"]
    assert "sm_75" in problems(ONE_T4, variant="int8_flash2")["attention"]
    bare = Machine((A100,), "", 8, {})
    assert "not installed" in problems(bare, variant="int8_flash2")["attention"]
    assert "fp32" in problems(NODE, "quantization.precision=fp32", variant="int8_flash2")["attention"]


def test_no_gpu_is_said_once() -> None:
    found = problems(CPU, "strategy.accelerator=gpu", variant="int8_flash2")
    assert list(found) == ["strategy.accelerator"]
    assert "no GPU that torch can use. Take strategy.accelerator=cpu" in found["strategy.accelerator"]
    blind = Machine(driver="470.1", cores=2, packages=PACKAGES)
    assert "driver is 470.1" in problems(blind, "strategy.accelerator=gpu")["strategy.accelerator"]


def test_more_devices_than_there_are() -> None:
    found = problems(ONE_T4, "strategy=ddp", "strategy.devices=4")
    assert found == {"strategy.devices": "is 4, and this machine has 1 GPU"}
    assert problems(NODE, "strategy=ddp", "strategy.devices=4") == {}


def test_precision_that_the_device_lacks() -> None:
    assert "sm_80" in problems(ONE_T4, "quantization.precision=bf16")["quantization.precision"]
    assert "CPU" in problems(CPU, "quantization.precision=fp16")["quantization.precision"]
    assert "integer" in problems(Machine((V100,), "", 8, PACKAGES))["quantization"]


def test_packages_that_are_absent() -> None:
    bare = Machine(cores=2)
    assert "bitsandbytes" in problems(bare, variant="int4_sdpa")["quantization"]
    assert "peft" in problems(bare, variant="lora_sdpa")["quantization.lora"]
    assert "bitsandbytes" in problems(bare, "optim=adamw8bit")["optim.name"]


def test_batches_that_do_not_divide() -> None:
    words = ["strategy=ddp", "strategy.devices=3", "strategy.accelerator=cpu"]
    assert "64, which 3 devices cannot share equally" in problems(CPU, *words)["data.batch_size"]
    assert "63 or 66" in problems(CPU, *words)["data.batch_size"]
    assert "3 or 6" not in problems(CPU, *words, "data.batch_size=2")["data.batch_size"]
    found = check(recipe("strategy.micro_batch=24"), CPU)
    assert [each.path for each in found] == ["strategy.micro_batch"]
    assert found[0].allowed == "1, 2, 4, 8, 16, 32, 64"


@settings(max_examples=200, deadline=None)
@given(
    batch=st.integers(1, 512),
    micro=st.none() | st.integers(1, 64),
    here=st.integers(1, 8),
    nodes=st.integers(1, 3),
)
def test_no_batch_problem_means_that_it_divides(batch: int, micro: int | None, here: int, nodes: int) -> None:
    launch = Launch("srun", here * nodes, nodes, here) if nodes > 1 else None
    machine = Machine((A100,) * here, "", 64, PACKAGES, launch)
    asked = recipe("strategy=ddp", f"strategy.nodes={nodes}", f"data.batch_size={batch}")
    asked = asked.model_copy(update={"strategy": asked.strategy.model_copy(update={"micro_batch": micro})})
    found, _ = resolve(asked, machine)
    assert found.strategy.micro_batch is not None
    divides = batch % (here * nodes * found.strategy.micro_batch) == 0
    assert (check(asked, machine) == []) == divides


def test_nodes_that_nobody_starts_are_refused() -> None:
    """The first would wait for the others in vain."""
    assert "`python -m vit_efficient.submit`" in problems(NODE, "strategy=ddp", "strategy.nodes=2")["strategy.nodes"]
    started = replace(NODE, launch=Launch("torchrun", 2 * len(NODE.gpus), 2))
    assert problems(started, "strategy=ddp", "strategy.nodes=2") == {}


def test_shards_are_needed_where_nothing_prepares_itself() -> None:
    found = problems(CPU, "protocol=cifar10")
    assert "python -m vit_efficient.prepare cifar10" in found["data.shards"]
    assert problems(CPU, "protocol=cifar10", "data.shards=x") == {}
    assert problems(CPU, "protocol=cifar10", "data.eval_shards=x") == {}  # enough to evaluate


def test_all_problems_at_once() -> None:
    found = problems(
        CPU, "protocol=cifar10", "strategy.micro_batch=3", "quantization.precision=fp16", variant="int8_flash2"
    )
    assert set(found) == {"data.shards", "strategy.micro_batch", "quantization.precision", "attention"}


def test_known_disappointments_are_said() -> None:
    assert "not faster" in caveats(recipe(variant="int4_sdpa"), NODE)[0]
    assert "Tesla T4" in caveats(recipe(), ONE_T4)[0]
    assert caveats(recipe(), NODE) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("quantization=int4", "quantization.lora=null"), "int4 leaves nothing to train here: set quantization.lora"),
        (("quantization=int4", "quantization.type=int"), "int4 leaves nothing to train here: take a variant"),
        (("quantization=bnb_int8",), "bnb_int8 leaves nothing to train here: set quantization.lora"),
        (("quantization=torchao",), "torchao leaves nothing to train here: take a variant"),
    ],
)
def test_what_cannot_be_trained_is_refused_where_training_is_asked(words: tuple[str, ...], said: str) -> None:
    recipe = load_recipe("fp32_sdpa", words).recipe
    (problem,) = check(recipe, TRAINER, trains=True)
    assert problem.path == "quantization"
    assert problem.message.startswith(said)
    assert check(recipe, TRAINER) == []


@pytest.mark.parametrize("name", ["int4_sdpa", "lora_sdpa", "int8_sdpa", "fp8_sdpa", "w4a8_sdpa", "int8_static_sdpa"])
def test_what_can_be_trained_is_not(name: str) -> None:
    assert check(load_recipe(name).recipe, TRAINER, trains=True) == []


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("int8_sdpa", ("quantization.dynamic_scale=tensor",)),
        ("fp8_sdpa", ("quantization.activations=tensor",)),
        ("fp32_sdpa", ("quantization=bnb_int8",)),
    ],
)
def test_padding_beside_what_all_tokens_share(variant: str, words: tuple[str, ...]) -> None:
    found = problems(CPU, *words, "model.pad_tokens=8", variant=variant)
    assert "the padding among them. Take model.pad_tokens=0" in found["model.pad_tokens"]
    assert "model.pad_tokens" not in problems(CPU, *words, variant=variant)
    assert "model.pad_tokens" not in problems(CPU, "model.pad_tokens=8", variant="int8_sdpa")
