"""The memory estimate against what PyTorch itself keeps for the backward pass, and against conservation laws."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from vit_efficient.errors import CapabilityError
from vit_efficient.measure.layout import Layout, Weights, buffers
from vit_efficient.measure.memory import Plan, estimate_recipe, peak_memory_bytes, weight_bytes
from vit_efficient.model.build import build_model, compute_dtype
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import Recipe

SMALL = ["strategy.micro_batch=8"]
VARIANTS = [
    ("fp32_sdpa", []),
    ("fp32_sdpa", ["quantization.precision=bf16"]),
    ("fp32_sdpa", ["attention.kernel=math"]),
    ("int8_sdpa", []),
    ("int8_sdpa", ["quantization.precision=bf16"]),
    ("int8_static_sdpa", []),
    ("w4a8_sdpa", []),
    ("fp8_sdpa", []),
    ("lora_sdpa", ["quantization.precision=bf16"]),
    ("lora_sdpa", ["quantization.lora.dora=true"]),
    ("int4_sdpa", []),
    ("int4_sdpa", ["quantization.precision=bf16"]),
]


def recipe_of(variant: str, words: list[str] = ()) -> Recipe:  # type: ignore[assignment]
    given = [] if any(word.startswith("quantization.precision") for word in words) else ["quantization.precision=fp32"]
    return load_recipe(variant, [*given, *SMALL, *words]).recipe


class Kept:
    """What autograd holds in the place of a tensor, for as long as it holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@contextmanager
def kept_by_autograd(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Within, autograd hands over all that a real forward pass keeps; call what is yielded for its bytes.

    Weights are left out, and what was let go with a part of the graph that nothing leads to.
    """
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    held: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        held.add(kept := Kept(tensor))
        return kept

    def count() -> int:
        sizes = {k.tensor.untyped_storage().data_ptr(): k.tensor.untyped_storage().nbytes() for k in held}
        return sum(size for place, size in sizes.items() if place not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield count


@pytest.mark.parametrize(("variant", "words"), VARIANTS)
def test_what_is_kept_equals_what_a_real_step_keeps(variant: str, words: list[str]) -> None:
    recipe = recipe_of(variant, words)
    built = build_model(recipe, 10)
    model, dtype = built.model.train(), compute_dtype(recipe)
    for module in model.modules():  # static scales are NaN before calibration, which changes no size
        if isinstance(module, nn.LayerNorm) and dtype != torch.float32:
            # CUDA's autocast hands norms float32; so does this test's CPU
            module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    with kept_by_autograd(model) as kept, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        images = torch.randn(8, 3, built.image.size, built.image.size)
        loss = nn.functional.cross_entropy(model(images).float(), torch.full((8, 10), 0.1))
        real = kept()
    assert loss.requires_grad
    counted = Plan(recipe, 10).step(8, checkpointing=False, narrow=False)
    frozen_embedding = 0 if model.patch_embed.proj.weight.requires_grad else images.nbytes  # a batch stays all the same
    assert counted.kept == pytest.approx(real + frozen_embedding, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    plan = Plan(recipe_of("fp32_sdpa"), 10)
    plain, saved = (plan.step(8, checkpointing=on, narrow=False) for on in (False, True))
    assert saved.kept < 0.3 * plain.kept
    assert saved.kept < saved.backward < plain.backward, "one block at a time is run again in full"


def test_weights_gradients_states_and_average_are_exact() -> None:
    recipe = recipe_of("fp32_sdpa", ["optim.ema=0.99"])
    count = sum(p.numel() for p in build_model(recipe, 10).model.parameters())
    needed = estimate_recipe(recipe, 10)
    assert (needed.gradients, needed.optimizer, needed.average) == (4 * count, 8 * count, 4 * count)
    assert needed.weights == weight_bytes(build_model(recipe, 10).model)
    assert estimate_recipe(recipe_of("fp32_sdpa", ["optim.name=adamw8bit"]), 10).optimizer == 2 * count


@pytest.mark.parametrize("variant", ["lora_sdpa", "int4_sdpa", "int8_sdpa"])
def test_weights_of_a_pretended_model_weigh_what_the_real_ones_do(variant: str) -> None:
    recipe = recipe_of(variant, ["quantization.precision=bf16"])
    assert weight_bytes(Plan(recipe, 10).built.model) == weight_bytes(build_model(recipe, 10).model)


def test_activations_are_affine_in_the_images() -> None:
    plan = Plan(recipe_of("int4_sdpa"), 10)
    one, two, four = (plan.step(n, checkpointing=False, narrow=False).kept for n in (16, 32, 64))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


@pytest.mark.parametrize("world", [2, 8, 64])
def test_shards_add_up_to_the_whole(world: int) -> None:
    plan = Plan(recipe_of("fp32_sdpa"), 10)
    whole = plan.estimate(Layout(), 8, checkpointing=False)
    shard = plan.estimate(Layout("fsdp", world), 8, checkpointing=False)
    for part, total in ((shard.weights, whole.weights), (shard.gradients, whole.gradients)):
        assert total <= part * world < total + world
    zero = [plan.estimate(Layout("deepspeed", world, stage=n), 8, checkpointing=False) for n in (1, 2, 3)]
    assert [z.optimizer for z in zero] == [shard.optimizer] * 3
    assert zero[0].gradients == whole.gradients > zero[1].gradients == shard.gradients
    assert zero[1].weights > whole.weights, "a second copy of one's part"
    assert zero[2].weights == pytest.approx(2 * shard.weights, rel=0.01)


def test_ddp_holds_its_gradients_once_and_throughout() -> None:
    plan = Plan(recipe_of("fp32_sdpa"), 10)
    alone, two = (plan.estimate(Layout("ddp", n), 8, checkpointing=False) for n in (1, 2))
    whole = plan.estimate(Layout(), 8, checkpointing=False, accumulate=2)
    assert two == whole, "as much as with accumulation, which holds them throughout too"
    assert alone.allocated <= two.allocated <= alone.allocated + two.gradients


def test_one_device_needs_no_buffers_and_hybrid_shards_within_a_node() -> None:
    plan = Plan(recipe_of("fp32_sdpa"), 10)
    for kind in ("single", "ddp", "fsdp"):
        assert plan.estimate(Layout(kind), 8, checkpointing=False).buffers == 0
    hybrid = plan.estimate(Layout("fsdp", 4, 8, hybrid=True), 8, checkpointing=False)
    node = plan.estimate(Layout("fsdp", 4), 8, checkpointing=False)
    assert hybrid.weights == node.weights > plan.estimate(Layout("fsdp", 4, 8), 8, checkpointing=False).weights


@pytest.mark.parametrize(
    ("units", "bytes_"),
    [
        (1, 10 + 20),  # its gradients, and these once more in float32
        (2, 10 + 10 + 20),  # the first unit's weights, its gradients, the last one's on their way in float32
        (3, 10 + 10 + 40),  # two of them on their way
        (6, 40 + 10 + 40),  # of six, two have let go
    ],
)
def test_units_that_stay_gathered_let_go_in_the_backward_pass(units: int, bytes_: int) -> None:
    """Of 5 numbers each, gathered in 16 bits; nothing outside them."""
    weights = Weights(0, 0, 5 * units, 10, 5, 0, unit=10, kept=10 * units, unit_trained=5)
    assert buffers(Layout("fsdp", 2), weights) == bytes_
    assert buffers(Layout("fsdp", 2), replace(weights, kept=0)) == 3 * 10 + 3 * 20
    assert buffers(Layout("fsdp", 2), replace(weights, unit_trained=0)) == 10 * units + 10, "the forward pass"


def test_offload_leaves_activations_and_buffers() -> None:
    plan = Plan(recipe_of("fp32_sdpa"), 10)
    away = plan.estimate(Layout("fsdp", 2, offload_states=True, offload_weights=True), 8, checkpointing=False)
    assert (away.weights, away.gradients, away.optimizer) == (0, 0, 0)
    assert away.activations > 0 < away.buffers


def test_a_teacher_is_counted_in_the_dtype_of_the_arithmetic() -> None:
    words = ["quantization.precision=bf16", "quantization.distill.teacher=x", "quantization.distill.alpha=0.5"]
    recipe = recipe_of("int8_sdpa", words)
    plan = Plan(recipe, 10)
    assert plan.estimate(Layout(), 8, checkpointing=False).teacher == 2 * plan.built.parameters


def test_what_cannot_be_estimated_is_refused_with_a_reason() -> None:
    with pytest.raises(CapabilityError, match="quantization=torchao cannot be estimated"):
        estimate_recipe(recipe_of("fp32_sdpa", ["quantization=torchao"]), 10)
    with pytest.raises(CapabilityError, match="nothing is trained"):
        estimate_recipe(recipe_of("int4_group_sdpa"), 10)


def test_pretending_leaves_nothing_behind() -> None:
    from vit_efficient.kernels.int8_linear import passes

    block = passes.BLOCK
    estimate_recipe(recipe_of("int4_sdpa"), 10)
    assert block == passes.BLOCK
    model = build_model(recipe_of("int4_sdpa"), 10).model.eval()  # the code books that it needs are real ones
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


def test_peak_memory_of_a_process_is_plausible() -> None:
    assert 50 * 2**20 < peak_memory_bytes(torch.device("cpu")) < 2**40
