"""Each observer on distributions whose answer is known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vit_efficient.errors import UserError
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.observers import BINS, NARROWEST, histogram, threshold

OBSERVERS = ("minmax", "percentile", "mse", "entropy")


def found(
    observer: str, x: Tensor, weight_T: Tensor | None = None, *, code: int = 127, percentile: float = 99.99
) -> float:
    config = CalibrationConfig(observer=observer, percentile=percentile)  # type: ignore[arg-type]
    return threshold(x, code, config, weight_T)


def magnitudes(*counts: tuple[float, int]) -> Tensor:
    """(value, how often), with signs that alternate, as one column."""
    values = torch.cat([torch.full((count,), value) for value, count in counts])
    return (values * (1 - 2 * (torch.arange(len(values)) % 2))).unsqueeze(1)


def test_histogram_counts_magnitudes() -> None:
    counts, largest = histogram(magnitudes((0.0, 3), (1.0, 5), (2.0, 7), (4.0, 1)))
    assert largest == 4
    assert counts.shape == (BINS,)
    assert counts.nonzero().flatten().tolist() == [0, BINS // 4, BINS // 2, BINS - 1]
    assert counts[counts > 0].tolist() == [3, 5, 7, 1]


def test_histogram_counts_rows_by_their_weight() -> None:
    x = torch.tensor([[1.0, -1.0], [4.0, 2.0], [3.0, 3.0]])
    counts, largest = histogram(x, torch.tensor([0.5, 2.0, 0.0]))
    assert largest == 4  # the range is that of all values, weighted or not
    assert counts.sum() == 2 * 2.5
    assert counts[BINS // 4] == 2 * 0.5
    assert counts[BINS // 2] == counts[BINS - 1] == 2.0
    assert counts[3 * BINS // 4] == 0
    alike, _ = histogram(x, torch.full((3,), 3.0))
    assert torch.equal(alike, 3 * histogram(x)[0])


def test_minmax_is_the_largest_magnitude() -> None:
    x = torch.randn(500, 3)
    x[17, 1] = -31.5
    assert found("minmax", x) == 31.5


@pytest.mark.parametrize("percentile", [60.0, 90.0, 99.0, 100.0])
def test_percentile_of_a_uniform_distribution(percentile: float) -> None:
    x = torch.linspace(-1, 1, 20_001).unsqueeze(1)
    assert found("percentile", x, percentile=percentile) == pytest.approx(percentile / 100, abs=2 / BINS)


def test_percentile_leaves_outliers_out() -> None:
    """Of 10,000 values one is an outlier: 99.99 % of the values lie below it, 100 % do not."""
    x = magnitudes((1.0, 9_999), (8.0, 1))
    assert found("percentile", x) == pytest.approx(1, abs=8 / BINS)
    assert found("percentile", x, percentile=100) == 8


def test_mse_is_that_of_brute_force() -> None:
    """Against the same search on the values themselves, over a fine grid of ranges."""
    torch.manual_seed(0)
    x = torch.distributions.Laplace(0.0, 1.0).sample((20_000, 1))
    for code in (7, 127):
        own = found("mse", x, code=code)
        ranges = float(x.abs().max()) * torch.linspace(NARROWEST, 1, 400)
        errors = []
        for limit in ranges.tolist():
            step = limit / code
            errors.append(float(((x / step).round().clamp(-code, code) * step - x).square().mean()))
        step = own / code
        error = float(((x / step).round().clamp(-code, code) * step - x).square().mean())
        assert error <= 1.02 * min(errors)
        assert error < (0.8 if code == 7 else 1.0) * errors[-1]  # and with few codes well below that of the whole range


def test_mse_weighs_saturation_against_rounding_by_hand() -> None:
    """With 7 codes, values of 1 to 7 and one of 14: a step of 1 keeps all but the last, a step of 2 halves the rest.

    With one large value its saturation costs 49, and rounding of a thousand odd ones 1 each: saturate. With many of
    them it is the other way.
    """
    odd = [(value, 1000) for value in (1.0, 3.0, 5.0, 7.0)]
    assert found("mse", magnitudes(*odd, (14.0, 1)), code=7) == pytest.approx(7, rel=0.05)
    assert found("mse", magnitudes(*odd, (14.0, 4000)), code=7) == pytest.approx(14, rel=0.05)


def test_entropy_keeps_a_uniform_distribution_whole() -> None:
    x = torch.linspace(-1, 1, 200_001).unsqueeze(1)
    assert found("entropy", x) == pytest.approx(1, abs=0.02)


def test_entropy_cuts_a_long_thin_tail() -> None:
    """Normal values and a few outliers twenty times as large: codes are worth more on the former."""
    torch.manual_seed(0)
    x = torch.randn(100_000, 1)
    x[:5] = 80.0
    assert 2.5 < found("entropy", x) < 40
    assert found("minmax", x) == 80


@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_lie_within_the_values(observer: str) -> None:
    torch.manual_seed(0)
    for x in (torch.randn(3000, 1), torch.rand(3000, 1) ** 8, magnitudes((1.0, 1)), magnitudes((3.0, 50), (5.0, 1))):
        for code in (7, 127):
            assert 0 < found(observer, x, code=code) <= float(x.abs().max()) * (1 + 1e-6)


def test_percentile_of_all_is_at_most_the_largest_magnitude() -> None:
    """Sums of weights round, and the last bin's share of them may stay below 1; weights too small to count do not."""
    for seed in range(100):
        torch.manual_seed(seed)
        x, weight = torch.randn(500, 3), torch.rand(500) ** 30
        assert 0.5 * float(x.abs().max()) < found("percentile", x, weight, percentile=100) <= float(x.abs().max())


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("size", [1e-36, 1e38])
def test_magnitudes_at_the_ends_of_float32(observer: str, size: float) -> None:
    x = magnitudes((size, 100), (0.5 * size, 100))
    assert found(observer, x, code=7) == pytest.approx(size, rel=0.2)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_scaling_the_values_scales_the_range(observer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 2)
    for factor in (2.0**-60, 2.0**40):
        assert found(observer, x * factor) == pytest.approx(found(observer, x) * factor, rel=1e-6)


@pytest.mark.parametrize("observer", [name for name in OBSERVERS if name != "minmax"])
def test_tokens_that_do_not_matter_do_not_widen_the_range(observer: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 8)
    x[:100] *= 20
    weight = torch.ones(2000)
    weight[:100] = 0
    assert found(observer, x, weight, code=7) < 0.1 * found("minmax", x)
    if observer != "entropy":  # which cuts them off anyway
        assert found(observer, x, weight, code=7) < 0.7 * found(observer, x, code=7)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_constant(observer: str) -> None:
    assert found(observer, torch.zeros(10, 3)) == 0
    assert found(observer, torch.full((10, 3), -2.0)) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(observer: str, bad: float) -> None:
    x = torch.randn(10, 3)
    x[4, 1] = bad
    with pytest.raises(UserError, match="NaN or an infinity"):
        found(observer, x)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_nothing_is_refused(observer: str) -> None:
    with pytest.raises(UserError, match="saw no activations"):
        found(observer, torch.empty(0, 3))
