"""Codes that make up for each other: never worse than rounding to nearest, within their limits, and the best there are
where all can be tried."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vit_efficient.kernels.int8_linear.op import dequantize_weight, quantize_weight
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization import gptq
from vit_efficient.quantization.gptq import Grid, quantize, search_grid

SCHEMES = {
    "W8": Scheme(),
    "W4": Scheme(weight_bits=4),
    "W4 groups": Scheme(weight_bits=4, group=32),  # of 80 inputs: 32, 32 and 16
    "W4 zero points": Scheme(weight_bits=4, group=32, zero_point=True),
    "W4 one zero point": Scheme(weight_bits=4, zero_point=True),
    "W8 groups": Scheme(group=64),
}
INPUTS = 80


def moments(inputs: int, rows: int, seed: int, *, rank: int | None = None) -> Tensor:
    """Second moments of inputs that are correlated, and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, rank or inputs, generator=generator) @ torch.randn(
        rank or inputs, inputs, generator=generator
    )
    x = mixed * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=generator)]
    return x.T @ x / rows


def weight_of(rows: int, inputs: int, seed: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1000 + seed)) + 0.2


def error(weight: Tensor, rounded: Tensor, h: Tensor) -> Tensor:
    """Of each output (N,): the squared change that the inputs of moments `h` see."""
    change = (weight - rounded).double()
    return ((change @ h.double()) * change).sum(dim=1)


def nearest(weight: Tensor, scheme: Scheme, grid: Grid | None = None) -> Tensor:
    scale, zero = (None, None) if grid is None else (grid.scale, grid.zero)
    codes, made = quantize_weight(weight, scheme, scale, zero)
    return dequantize_weight(codes, made, scheme, torch.float32)


def damped(h: Tensor) -> Tensor:
    return h + gptq.DAMPING * h.diagonal().mean() * torch.eye(len(h))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rank", [None, 5], ids=["full rank", "rank 5"])
def test_error_is_never_above_that_of_rounding_to_nearest(name: str, rank: int | None) -> None:
    """For every single output, on the (damped) moments that are minimised; and on the whole far below it."""
    scheme = SCHEMES[name]
    for seed in range(5):
        h, weight = moments(INPUTS, 200, seed, rank=rank), weight_of(24, INPUTS, seed)
        codes, grid = quantize(weight, h, scheme)
        own = error(weight, dequantize_weight(codes, grid.scale, scheme, torch.float32), damped(h))
        grid = search_grid(weight, damped(h).diagonal(), scheme)  # the same grid; its scales are then refitted
        plain = error(weight, nearest(weight, scheme, grid), damped(h))
        assert (own <= plain * (1 + 1e-5)).all(), (own / plain).max()
        assert own.sum() < 0.7 * plain.sum()
        assert own.sum() < 0.7 * error(weight, nearest(weight, scheme), damped(h)).sum()


@pytest.mark.parametrize("scheme", [Scheme(weight_bits=4), Scheme(weight_bits=4, group=4), Scheme()], ids=str)
def test_nor_where_compensation_is_unlucky(scheme: Scheme) -> None:
    """It is greedy: of rows of 8 weights it loses several in a hundred to plain rounding."""
    for seed in range(40):
        h, weight = moments(8, 40, seed), weight_of(32, 8, seed)
        codes, grid = quantize(weight, h, scheme)
        own = error(weight, dequantize_weight(codes, grid.scale, scheme, torch.float32), damped(h))
        plain = error(weight, nearest(weight, scheme, search_grid(weight, damped(h).diagonal(), scheme)), damped(h))
        assert (own <= plain * (1 + 1e-4)).all(), f"seed {seed}: {(own / plain).max()}"


def test_blocks_of_columns_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = damped(moments(INPUTS, 200, 2)), weight_of(24, INPUTS, 2)
    scale, limits = torch.full((24, INPUTS), 0.3), Grid(torch.ones(24, 1), None, 7).limits(INPUTS, INPUTS)
    whole = gptq._compensated(weight, h, scale, limits)
    monkeypatch.setattr(gptq, "BLOCK", 24)  # 24, 24, 24 and 8
    assert (gptq._compensated(weight, h, scale, limits) == whole).float().mean() > 0.99  # but for ties


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_whole_numbers_within_their_limits(name: str) -> None:
    scheme = SCHEMES[name]
    weight = weight_of(24, INPUTS, 0)
    weight[3] += 5  # all on one side of zero
    weight[4] = 0
    codes, grid = quantize(weight, moments(INPUTS, 100, 0), scheme)
    assert codes.shape == (24, INPUTS)
    assert grid.scale.shape == (24, scheme.groups(INPUTS))
    assert torch.equal(codes, codes.round())
    assert (grid.scale > 0).all()
    if scheme.zero_point:
        assert grid.zero is not None
        assert torch.equal(grid.zero, grid.zero.round().clamp(0, 15))
        stored = codes + grid.zero.repeat_interleave(scheme.group or INPUTS, dim=1)[:, :INPUTS]
        assert (stored.amin(), stored.amax()) == (0, 15)
    else:
        assert grid.zero is None
        assert codes.abs().max() == scheme.largest_weight
    # What the layer makes of the rounded weight and the grid are these codes again.
    rounded = dequantize_weight(codes, grid.scale, scheme, torch.float32)
    again, _ = quantize_weight(rounded, scheme, grid.scale, grid.zero)
    assert torch.equal(again.float(), codes)


def test_best_codes_of_all() -> None:
    """Three inputs, one scale that is given: of the 15^3 codes the coordinate descent stops at one that no change of a
    single code betters, and in most cases at the best of all."""
    step = torch.tensor([[0.4]])
    every = torch.tensor(list(itertools.product(range(-7, 8), repeat=3)), dtype=torch.float32)
    limits = Grid(step, None, 7).limits(3, 3)
    best = 0
    for seed in range(40):
        weight, h = weight_of(1, 3, seed), moments(3, 50, seed)
        codes = gptq._compensated(weight, h, step.expand(1, 3), limits)
        for _ in range(10):
            codes = gptq._descend(weight, h, codes, step.expand(1, 3), limits)
        own = error(weight, codes * step, h)
        errors = error(weight.expand(len(every), 3), every * step, h)
        neighbours = (every - codes).count_nonzero(dim=1) <= 1
        assert own <= errors[neighbours].min() * (1 + 1e-6)
        assert own <= error(weight, (weight / step).round().clamp(-7, 7) * step, h) * (1 + 1e-6)
        best += bool(own <= errors.min() * (1 + 1e-6))
    assert best >= 30


def test_each_step_lowers_the_error() -> None:
    h, weight, scheme = damped(moments(INPUTS, 200, 3)), weight_of(16, INPUTS, 3), SCHEMES["W4 groups"]
    grid = search_grid(weight, h.diagonal(), scheme)
    limits = grid.limits(32, INPUTS)

    def of(codes: Tensor, scale: Tensor) -> Tensor:
        return error(weight, dequantize_weight(codes, scale, scheme, torch.float32), h)

    spread = gptq._spread(grid.scale, 32, INPUTS)
    codes = gptq._compensated(weight, h, spread, limits)
    refitted = gptq._refit(weight, h, codes, grid.scale, 32)
    moved = gptq._descend(weight, h, codes, gptq._spread(refitted, 32, INPUTS), limits)
    errors = [of(codes, grid.scale), of(codes, refitted), of(moved, refitted)]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert (errors[2] <= errors[1] * (1 + 1e-6)).all()
    assert errors[2].sum() < errors[0].sum()


def test_refitted_scales_are_least_squares() -> None:
    """Of one group: the closed form of a projection. Of three: no small change of any scale is better."""
    h, weight = damped(moments(INPUTS, 200, 4)), weight_of(8, INPUTS, 4)
    one = SCHEMES["W4"]
    codes, made = quantize_weight(weight, one)
    codes, scale = codes.float(), gptq._refit(weight, h, codes.float(), made, INPUTS)
    by_hand = ((weight @ h) * codes).sum(dim=1) / ((codes @ h) * codes).sum(dim=1)
    torch.testing.assert_close(scale[:, 0], by_hand, rtol=1e-4, atol=0)

    groups = SCHEMES["W4 groups"]
    codes, made = quantize_weight(weight, groups)
    codes, scale = codes.float(), gptq._refit(weight, h, codes.float(), made, 32)
    least = error(weight, dequantize_weight(codes, scale, groups, torch.float32), h)
    for group, factor in itertools.product(range(3), (0.99, 1.01)):
        other = scale.clone()
        other[:, group] *= factor
        assert (error(weight, dequantize_weight(codes, other, groups, torch.float32), h) > least).all()


def test_a_scale_is_never_refitted_at_the_expense_of_the_error() -> None:
    """Where some scales of a row are kept because they would run away, the others must not make it worse."""
    scheme = Scheme(weight_bits=4, group=4)
    for seed in range(200):
        h, weight = damped(moments(12, 40, seed, rank=2)), weight_of(16, 12, seed)
        codes, made = quantize_weight(weight, scheme)
        scale = gptq._refit(weight, h, codes.float(), made, 4)
        before, after = (error(weight, dequantize_weight(codes, s, scheme, torch.float32), h) for s in (made, scale))
        assert (after <= before * (1 + 1e-6)).all(), f"seed {seed}: {(after / before).max()}"


@pytest.mark.parametrize("name", SCHEMES)
def test_inputs_that_were_always_zero(name: str) -> None:
    """Nothing is known of their weights' effect: they are rounded like any other, and nothing overflows."""
    scheme, h, weight = SCHEMES[name], moments(INPUTS, 200, 5), weight_of(8, INPUTS, 5)
    h[[7, 50]], h[:, [7, 50]] = 0, 0
    codes, grid = quantize(weight, h, scheme)
    assert codes.isfinite().all()
    rounded = dequantize_weight(codes, grid.scale, scheme, torch.float32)
    step = gptq._spread(grid.scale, scheme.group or INPUTS, INPUTS)
    for k in (7, 50):
        inside = codes[:, k].abs() < scheme.largest_weight
        assert ((rounded - weight)[inside, k].abs() <= 1.6 * step[inside, k]).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_grid_is_the_whole_range_where_nothing_was_seen(name: str) -> None:
    scheme, weight = SCHEMES[name], weight_of(8, INPUTS, 6)
    grid = search_grid(weight, torch.zeros(INPUTS), scheme)
    torch.testing.assert_close(grid.scale, quantize_weight(weight, scheme)[1], rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_inputs_of_nothing_but_zeros(name: str) -> None:
    scheme, weight = SCHEMES[name], weight_of(8, INPUTS, 6)
    codes, grid = quantize(weight, torch.zeros(INPUTS, INPUTS), scheme)
    rounded = dequantize_weight(codes, grid.scale, scheme, torch.float32)
    plain = (nearest(weight, scheme) - weight).square().sum()
    assert (rounded - weight).square().sum() <= 1.01 * plain  # all inputs alike: as good as rounding to nearest


def test_moments_of_one_token() -> None:
    """Rank one: more unknowns than equations. The one output that was seen is met almost exactly."""
    x, weight = torch.randn(1, INPUTS, generator=torch.Generator().manual_seed(7)), weight_of(8, INPUTS, 7)
    for scheme in SCHEMES.values():
        codes, grid = quantize(weight, x.T @ x, scheme)
        rounded = dequantize_weight(codes, grid.scale, scheme, torch.float32)
        own, plain = ((part - weight) @ x[0] for part in (rounded, nearest(weight, scheme)))
        assert own.norm() < 0.2 * plain.norm()


@pytest.mark.parametrize("name", SCHEMES)
def test_grid_is_never_worse_than_the_full_range(name: str) -> None:
    """Nor than any other part of it that is tried; counted by the inputs' second moments."""
    scheme, weight = SCHEMES[name], weight_of(16, INPUTS, 8)
    h = torch.rand(INPUTS, generator=torch.Generator().manual_seed(8)) ** 4 * 100
    weight[:, 11] *= 6
    h[11] = 0  # a large weight that no input reaches must not set the step
    grid = search_grid(weight, h, scheme)

    def cost(rounded: Tensor) -> Tensor:
        return ((rounded - weight).square() * h).sum(dim=1)

    own, full = cost(nearest(weight, scheme, grid)), cost(nearest(weight, scheme))
    assert (own <= full * (1 + 1e-6)).all()
    assert own.sum() < full.sum()


def test_the_same_twice() -> None:
    h, weight = moments(INPUTS, 200, 9), weight_of(8, INPUTS, 9)
    first, second = (quantize(weight, h, SCHEMES["W4 zero points"]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].scale, second[1].scale)


def test_operands_are_left_as_they_are() -> None:
    h, weight = moments(INPUTS, 200, 9), weight_of(8, INPUTS, 9)
    kept = h.clone(), weight.clone()
    quantize(weight, h, SCHEMES["W4"])
    assert torch.equal(h, kept[0])
    assert torch.equal(weight, kept[1])
