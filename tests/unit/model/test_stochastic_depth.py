"""Stochastic depth: what it drops, and that a compiler sees one block and not as many as there are rates."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch._dynamo.testing import CompileCounter

from vit_efficient.errors import UserError
from vit_efficient.model.build import build_model
from vit_efficient.model.stochastic_depth import StochasticDepth, Subsets, install
from vit_efficient.recipe.load import load_recipe

SMALL = (
    "model.name=vit_tiny_patch16_224", "model.image_size=32", "strategy.accelerator=cpu",
    "model.kwargs={patch_size: 8, depth: 6, embed_dim: 32, num_heads: 2, drop_path_rate: 0.3}",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_dropped_whole_and_the_mean_stays(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.rand(20_000, 2, 3, dtype=dtype) + 1
    y = StochasticDepth(0.3).train()(x)
    assert y.dtype == dtype
    stays = y[:, 0, 0] != 0
    assert abs(float(stays.float().mean()) - 0.7) < 0.01
    assert not y[~stays].any()
    torch.testing.assert_close(y[stays], (x[stays] / 0.7).to(dtype), rtol=4e-3, atol=0)
    assert float(y.double().sum() / (x.double() * stays.view(-1, 1, 1)).sum()) == pytest.approx(1 / 0.7, rel=3e-4)


def test_nothing_is_dropped_at_rate_0_or_in_evaluation() -> None:
    x = torch.rand(64, 3)
    assert StochasticDepth(0.0).train()(x).equal(x)
    assert StochasticDepth(0.5).eval()(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"not in \[0, 1\)"):
        StochasticDepth(rate)


@pytest.mark.parametrize("rate", ["1.0", "-0.2", "nan", "much"])
def test_a_recipes_rate_that_is_none_is_refused(rate: str) -> None:
    recipe = load_recipe("fp32_sdpa", [*SMALL[:3], f"model.kwargs={{patch_size: 8, drop_path_rate: {rate}}}"]).recipe
    with pytest.raises(UserError, match=r"^model\.kwargs\.drop_path_rate is .* less than 1"):
        build_model(recipe, 7)


@pytest.mark.parametrize("how", ["mask", "subset"])
def test_a_model_keeps_its_rates_and_its_parameters(how: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=4, drop_path_rate=0.3)
    names, wanted = list(model.state_dict()), [0.0, 0.1, 0.2, 0.3]
    install(model, how)
    assert list(model.state_dict()) == names
    for block, rate in zip(model.blocks, wanted, strict=True):
        for depth in (block.drop_path1, block.drop_path2):
            assert isinstance(depth, StochasticDepth)
            assert float(depth.scale) == pytest.approx(1 / (1 - rate))
    assert not any(isinstance(module, DropPath) for module in model.modules())


def test_a_model_without_any_is_left_alone() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    install(model, "subset")
    assert not model._forward_pre_hooks
    assert isinstance(model.blocks[0].drop_path1, nn.Identity)


@pytest.mark.parametrize(
    ("variant", "programs"),
    [("fp32_sdpa", 1), ("int8_sdpa", 1), ("int4_sdpa", 2)],  # of adapters: the first block's input has no gradient
)
@pytest.mark.parametrize("how", ["mask", "subset"])
def test_blocks_of_different_rates_are_one_program(variant: str, programs: int, how: str) -> None:
    """However many samples each of them keeps, and in later steps too."""
    torch._dynamo.reset()
    recipe = load_recipe(variant, [*SMALL, "quantization.precision=fp32", f"model.stochastic_depth={how}"]).recipe
    built = build_model(recipe, 7)
    counter = CompileCounter()
    for block in built.blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(4):
        built.model.train()(torch.randn(48, 3, 32, 32)).sum().backward()
    assert counter.frame_count == programs


def subsets(rates: list[float]) -> Subsets:
    return Subsets([StochasticDepth(rate) for rate in rates])


@pytest.mark.parametrize("batch", [1, 2, 3, 17, 47, 48, 60, 127, 254, 256])
def test_every_rate_holds_on_average(batch: int) -> None:
    rates = [0.0, 0.05, 0.1, 0.31, 0.97]
    up = ((np.arange(4000) + 0.5) / 4000).tolist()
    draws = np.array([subsets(rates).counts(batch, [u] * 5) for u in up])
    assert draws.min() >= 0
    assert draws.max() <= batch
    np.testing.assert_allclose(draws.mean(0) / batch, 1 - np.array(rates), atol=1e-3)
    assert (draws[:, 0] == batch).all(), "nothing is dropped at rate 0"
    assert all(len(set(column)) <= 2 for column in draws.T.tolist())
    kinds = {count for branch in subsets([i / 240 for i in range(48)]).counts(batch, [0.5] * 48) for count in (branch,)}
    assert len(kinds) <= 6, "few sizes"


def test_branches_are_dropped_independently() -> None:
    """At one image as masks are: of two branches of rate 0.5 each pair of outcomes in a quarter of the passes."""
    depths = [StochasticDepth(0.5) for _ in range(2)]
    hook, model, seen = Subsets(depths), nn.Identity().train(), np.zeros((2, 2))
    torch.manual_seed(0)
    for _ in range(2000):
        hook.draw(model, (torch.zeros(1, 1),), {})
        seen[tuple(int(depth.kept.number > 0) for depth in depths)] += 1
    np.testing.assert_allclose(seen / 2000, 0.25, atol=0.04)
