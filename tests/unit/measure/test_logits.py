"""Figures from logits, against cases computed by hand and published intervals."""

from __future__ import annotations

import math

import pytest
import torch

from vit_efficient.errors import UserError
from vit_efficient.measure.logits import compare, paired_drop, tango
from vit_efficient.quantization.agreement import Comparer

NAN, INF = float("nan"), float("inf")


def test_hand_computed() -> None:
    """Signal 50, noise 0.5, so 20 dB; the second image changes its class."""
    reference = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    logits = torch.tensor([[3.5, 4.0], [0.0, 4.5]])
    found = compare(reference, logits)
    assert found.snr_db == pytest.approx(20.0)
    assert (found.agreement, found.n, found.broken) == (1.0, 2, 0)
    assert compare(reference, logits.flip(1)).agreement == 0.0


def test_kl_is_of_reference_from_logits_in_nats() -> None:
    """KL((0.5, 0.5) || (0.9, 0.1)) = 0.5 ln(0.5 / 0.9) + 0.5 ln(0.5 / 0.1); the other direction differs."""
    half, skew = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert compare(half, skew).kl == pytest.approx(0.5108256)
    assert compare(skew, half).kl == pytest.approx(0.3680642)
    both = compare(torch.cat([half, half]), torch.cat([skew, half]))
    assert both.kl == pytest.approx(0.5108256 / 2), "the mean over images, not the sum"


def test_equal_logits() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    found = compare(logits, logits)
    assert (found.snr_db, found.kl, found.agreement) == (INF, 0.0, 1.0)


def test_batches_give_what_all_at_once_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, noise = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
    comparer = Comparer()
    for rows in (slice(0, 3), slice(3, 7)):
        comparer.update(reference[rows], (reference + noise)[rows])
    found, whole = comparer.result(), compare(reference, reference + noise)
    assert (found.snr_db, found.kl) == (pytest.approx(whole.snr_db), pytest.approx(whole.kl))
    assert found.agreement == whole.agreement


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_broken_model_is_worse_than_any_and_has_no_nan(bad: float) -> None:
    """The row with the NaN would agree by its argmax, had it been finite there."""
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = compare(reference, torch.tensor([[1.0, 0.0], [1.0, bad]]))
    assert (found.snr_db, found.kl, found.agreement, found.broken) == (-INF, INF, 0.5, 1)


def test_broken_reference_is_refused() -> None:
    with pytest.raises(UserError, match="1 of 2 images"):
        compare(torch.tensor([[1.0, NAN], [1.0, 0.0]]), torch.zeros(2, 2))


@pytest.mark.parametrize(("first", "second"), [((2, 3), (2, 4)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_shapes_that_do_not_fit(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits are|no images"):
        compare(torch.zeros(first), torch.zeros(second))


def test_drop_counts_pairs() -> None:
    """Of five: right twice by both, one lost, one gained, one wrong by both. NaN is never right, even for class 1."""
    labels = torch.tensor([0, 1, 0, 1, 0])
    reference = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1], [0, 1]])
    found = paired_drop(labels, reference, logits)
    assert (found.top1_reference, found.top1, found.lost, found.gained, found.n) == (0.6, 0.6, 1, 1, 5)
    assert found.drop == 0.0
    assert found.low == pytest.approx(-found.high)
    logits[1] = torch.tensor([0.0, NAN])
    broken = paired_drop(labels, reference, logits)
    assert (broken.lost, broken.gained, broken.drop) == (2, 1, pytest.approx(20.0))
    with pytest.raises(ValueError, match=r"labels are"):
        paired_drop(labels[:2], reference, logits)


def test_published_interval() -> None:
    """Airway reactivity before and after stem-cell transplantation, as in Fagerland, Lydersen and Laake (Statistics in
    Medicine 33, 2014): of 21 children 1 and 7 discordant, Tango's interval is -0.517 to -0.026."""
    low, high = tango(1, 7, 21)
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)
    assert tango(7, 1, 21) == (pytest.approx(-high), pytest.approx(-low))


def test_interval_without_discordant_pairs() -> None:
    """z^2 / (n + z^2), by hand from the score equation: 400 equal answers do not prove a drop of zero."""
    z_squared = 1.959964**2
    low, high = tango(0, 0, 400)
    assert high == pytest.approx(z_squared / (400 + z_squared))
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(("lost", "gained"), [(4, 0), (3, 0), (12, 3), (11, 3), (30, 16), (30, 17)])
def test_interval_leaves_out_zero_where_mcnemar_finds_a_difference(lost: int, gained: int) -> None:
    mcnemar = (lost - gained) / math.sqrt(lost + gained)
    assert (tango(lost, gained, 800)[0] > 0) == (mcnemar > 1.959964)


@pytest.mark.parametrize("n", [1, 5, 800])
def test_interval_stays_within_its_bounds(n: int) -> None:
    for lost, gained in ((n, 0), (0, n), (0, 0)):
        low, high = tango(lost, gained, n)
        assert -1 <= low <= (lost - gained) / n <= high <= 1
