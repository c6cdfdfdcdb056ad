"""Branches that are run for some samples only: the numbers of a mask, in every way that a model is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vit_efficient.engine.deployed import load_file, save_deployed
from vit_efficient.measure.memory import Plan
from vit_efficient.model.build import build_model
from vit_efficient.model.fused import fuse_blocks
from vit_efficient.model.stochastic_depth import StochasticDepth, Subsets, install
from vit_efficient.parallel.order import prepare_blocks
from vit_efficient.recipe.load import load_recipe

SMALL = (
    "model.name=vit_tiny_patch16_224", "model.image_size=32", "strategy.accelerator=cpu",
    "model.kwargs={patch_size: 8, depth: 6, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3}",
)  # fmt: skip


def build(*words: str, rate: float = 0.4, name: str = "vit_tiny_patch16_224", more: str = "") -> nn.Module:
    recipe = load_recipe(
        "fp32_sdpa",
        [f"model.name={name}", "model.image_size=32", "strategy.accelerator=cpu", "quantization.precision=fp32",
         f"model.kwargs={{depth: 3, embed_dim: 32, patch_size: 8, num_heads: 2, {more} drop_path_rate: {rate}}}",
         *words],
    ).recipe  # fmt: skip
    torch.manual_seed(0)
    return build_model(recipe, 7).model


@contextmanager
def watched(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The samples that each branch keeps, branch by branch."""
    seen: list[torch.Tensor] = []
    depths = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    handles = [depth.register_forward_pre_hook(lambda depth, _: seen.append(depth.kept.chosen)) for depth in depths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


NAMES = (
    "vit_tiny_patch16_224", "vit_base_patch16_rope_224", "deit3_small_patch16_224", "beit_base_patch16_224",
    "vit_relpos_base_patch16_224",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_subset_gives_what_a_mask_of_the_same_samples_gives(name: str) -> None:
    """Logits and every gradient, where the masks are those samples."""
    ours, theirs = build(name=name).double().train(), build("model.stochastic_depth=mask", name=name).double().train()
    theirs.load_state_dict(ours.state_dict())
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):  # of relative positions: other random numbers than those here
            module.p = 0.0
    x = torch.randn(32, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with watched(ours) as kept:
        ours_B7 = ours(x)
    dropped = 0
    for index, (block, other) in enumerate(zip(ours.blocks, theirs.blocks, strict=True)):
        assert block.drop_path1.kept is None
        for branch, own, mask in ((0, block.drop_path1, other.drop_path1), (1, block.drop_path2, other.drop_path2)):
            chosen = kept[2 * index + branch]
            weights = torch.zeros(32, 1, 1, dtype=torch.float64).index_fill_(0, chosen, 1 / (1 - own.rate))
            mask.forward = weights.__mul__
            dropped += 32 - len(chosen)
    assert dropped == pytest.approx(2 * 32 * (0.0 + 0.2 + 0.4), abs=4)
    theirs_B7 = theirs(x)
    torch.testing.assert_close(ours_B7, theirs_B7)
    wanted = torch.randn(32, 7, dtype=torch.float64)
    (ours_B7 * wanted).sum().backward()
    (theirs_B7 * wanted).sum().backward()
    for (key, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, key=key: f"{key}: {text}")


def test_dropped_samples_are_not_computed() -> None:
    model, seen = build().train(), []
    for block in model.blocks:
        for module in (block.attn, block.mlp):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for _ in range(20):
        model(torch.randn(32, 3, 32, 32))
    assert np.reshape(seen, (20, 6)).mean(0).tolist() == pytest.approx([32, 32, 25.6, 25.6, 19.2, 19.2], abs=1.0)
    seen.clear()
    model.eval()(torch.randn(32, 3, 32, 32))
    assert seen == [32] * 6


def test_samples_that_are_kept_change_from_step_to_step_and_with_the_seed_alone() -> None:
    model, x = build().train(), torch.randn(32, 3, 32, 32)

    def kept(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        with watched(model) as seen:
            model(x)
        return [chosen.tolist() for chosen in seen]

    first = kept(1)
    assert first != kept(2)
    assert first == kept(1)
    assert sorted(first[-1]) != list(range(len(first[-1]))), "not simply the first ones"


def test_every_sample_is_dropped_equally_often() -> None:
    depth, rest = StochasticDepth(0.25).train(), nn.Identity().train()
    hook, counts = Subsets([depth]), torch.zeros(6)
    for _ in range(4000):
        hook.draw(rest, (torch.zeros(6, 1),), {})
        assert depth.kept is not None
        counts[depth.kept.chosen] += 1
    assert (counts / 4000 - 0.75).abs().max() < 0.035


def test_a_single_image_keeps_its_branch_as_often_as_it_should() -> None:
    """And weights have a gradient whether or not: DDP and ZeRO wait for it."""
    model, x = build(rate=0.5), torch.randn(1, 3, 32, 32)
    model.train()
    zero = 0
    for _ in range(300):
        model.zero_grad()
        model(x).sum().backward()
        grads = [p.grad for p in model.blocks[2].mlp.parameters()]
        assert all(grad is not None for grad in grads)
        zero += not any(bool(grad.any()) for grad in grads)
    assert 110 < zero < 190


@pytest.mark.parametrize("compile", [False, True])
def test_recomputed_blocks_keep_the_same_samples(compile: bool) -> None:
    """With checkpointing, and compiled: the same gradients."""
    grads = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model = build().train()
        prepare_blocks(model.blocks, checkpointing=checkpointing, compile=compile and checkpointing)
        for step in range(2):
            torch.manual_seed(step)
            x = torch.randn(32, 3, 32, 32)
            model(x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compile", [False, True])
def test_half_precision_scales_exactly(compile: bool) -> None:
    depth = StochasticDepth(0.1).train()
    depth.keep(torch.arange(4), torch.arange(4))
    x = torch.full((4, 8), 180.0, dtype=torch.bfloat16, requires_grad=True)
    torch._dynamo.reset()
    y = torch.compile(depth, backend="aot_eager")(x) if compile else depth(x)
    y.backward(x.detach())
    assert y.unique().item() == 200.0, "199 where 1 / 0.9 is rounded first"
    assert x.grad.unique().item() == 200.0


def test_a_part_of_the_model_called_by_itself_has_masks() -> None:
    model = build().train()
    model(torch.randn(8, 3, 32, 32))
    assert model.forward_features(torch.randn(8, 3, 32, 32)).shape[0] == 8
    assert model.blocks(torch.randn(5, 16, 32)).shape == (5, 16, 32)
    model(x=torch.randn(8, 3, 32, 32))
    with pytest.raises(ValueError, match="unpack"):
        model(torch.randn(8, 3, 32, 32, 1))
    assert all(block.drop_path1.kept is None for block in model.blocks), "after an error too"


def test_two_passes_before_their_backward_pass() -> None:
    """Recomputation has the samples of its own pass."""
    grads = []
    for checkpointing in (False, True):
        model = build().train().double()
        prepare_blocks(model.blocks, checkpointing=checkpointing, compile=False)
        torch.manual_seed(3)
        x = torch.randn(2, 32, 3, 32, 32, dtype=torch.float64)
        (model(x[0]).square().sum() + model(x[1]).square().sum()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0])


def test_a_copy_draws_for_itself() -> None:
    model = build().train()
    twin = copy.deepcopy(model)
    with watched(twin) as seen:
        model(torch.randn(8, 3, 32, 32))
        assert not seen
        twin(torch.randn(5, 3, 32, 32))
    assert len(seen) == 6
    assert all(int(chosen.max()) < 5 for chosen in seen)


def test_the_whole_model_can_be_compiled() -> None:
    torch._dynamo.reset()
    model = build().train()
    compiled = torch.compile(model, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        torch.manual_seed(0)
        model.zero_grad()
        run(torch.randn(32, 3, 32, 32)).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


def test_a_model_in_16_bits_keeps_its_scale() -> None:
    depth = StochasticDepth(0.1).to(torch.bfloat16)
    assert depth.scale.dtype == torch.float32
    assert float(depth.scale) == pytest.approx(1 / 0.9, rel=1e-7)


def test_patches_left_out_with_positions_of_their_own_have_masks() -> None:
    model = build(name="vit_base_patch16_rope_224", more="patch_drop_rate: 0.25,").train()
    assert not model._forward_pre_hooks
    model(torch.randn(8, 3, 32, 32)).sum().backward()


def test_a_deployed_model_is_fused_as_before() -> None:
    recipe = load_recipe("int8_sdpa", [*SMALL, "quantization.precision=fp32"]).recipe
    built = build_model(recipe, 7)
    built.model.train()(torch.randn(4, 3, 32, 32)).sum().backward()
    recipe.quantization.finalize(built.model.eval())
    assert fuse_blocks(built.model).count() == "6 of 6 blocks fused"


def test_blocks_that_are_not_known_have_masks() -> None:
    model = timm.create_model("vit_base_patch16_rpn_224", depth=2, embed_dim=32, num_heads=2, drop_path_rate=0.3)
    install(model, "subset")
    assert isinstance(model.blocks[1].drop_path2, StochasticDepth)
    assert not model._forward_pre_hooks
    model.train()(torch.randn(2, 3, 224, 224)).sum().backward()


def test_memory_and_work_of_an_estimate_fall_with_the_rate() -> None:
    """Half of the last block and a quarter of the middle one: a quarter of all."""
    plans = {}
    for how in ("mask", "subset"):
        words = [*SMALL[:3], "model.kwargs={patch_size: 8, depth: 3, embed_dim: 64, num_heads: 2, drop_path_rate: 0.5}"]
        plan = Plan(load_recipe("fp32_sdpa", [*words, f"model.stochastic_depth={how}"]).recipe, 7)
        plans[how] = plan.count(64, checkpointing=False, narrow=False)
    (mask, mask_work), (subset, subset_work) = plans["mask"], plans["subset"]
    assert subset.kept / mask.kept == pytest.approx(0.75, abs=0.07)
    assert subset_work.full / mask_work.full == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_a_deployed_model_has_no_hooks_and_is_exported(fused: bool, tmp_path: Path) -> None:
    recipe = load_recipe("int8_sdpa", [*SMALL, "quantization.precision=fp32"]).recipe
    built = build_model(recipe, 7)
    assert built.model._forward_pre_hooks, "in training"
    recipe.quantization.finalize(built.model)
    save_deployed(tmp_path / "model.safetensors", built.model, recipe, list("abcdefg"))
    deployed = load_file(tmp_path / "model.safetensors")
    assert deployed.recipe == recipe
    model = deployed.model
    if fused:
        assert fuse_blocks(model).fused
    assert not any(module._forward_pre_hooks for module in model.modules() if not hasattr(module, "fold"))
    images = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (images,), strict=True).module()
    with torch.no_grad():
        assert torch.equal(exported(images), model(images))
