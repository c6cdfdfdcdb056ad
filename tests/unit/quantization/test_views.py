"""More views of the same images."""

from __future__ import annotations

import torch

from vit_efficient.quantization.views import SMALLEST, with_views


def images(count: int, size: int = 48) -> torch.Tensor:
    """Each pixel holds its place: rows in the first channel, columns in the second, the image's number in the third."""
    ramp = torch.linspace(-1, 1, size)
    planes = torch.stack((ramp[:, None].expand(size, size), ramp[None].expand(size, size), torch.zeros(size, size)))
    made = planes.repeat(count, 1, 1, 1)
    made[:, 2] = torch.arange(count)[:, None, None].float()
    return made


def test_one_view_is_the_images_themselves() -> None:
    batches = [images(3), images(2)]
    made = with_views(batches, 1)
    assert len(made) == 2
    assert all(a is b for a, b in zip(made, batches, strict=True))


def test_views_follow_the_images() -> None:
    batches = [images(3), images(2)]
    made = with_views(batches, 4)
    assert [len(batch) for batch in made] == [3, 2] * 4
    assert all(a is b for a, b in zip(made[:2], batches, strict=True))
    assert all(batch.shape[1:] == (3, 48, 48) for batch in made)
    for first in range(2, 8, 2):
        assert torch.allclose(made[first][:, 2, 20, 20], torch.arange(3.0), atol=1e-5)  # each of its own image


def test_views_are_crops_resized_back_and_mirrored_half_the_time() -> None:
    """Read off the ramps: where each view begins and ends in its image."""
    batch = images(400)
    view = with_views([batch], 2)[1]
    centre = slice(8, 40)  # away from the borders, where the interpolation reflects
    down = (view[:, 0, 39, 24] - view[:, 0, 8, 24]) / (batch[:, 0, 39, 24] - batch[:, 0, 8, 24])
    right = (view[:, 1, 24, 39] - view[:, 1, 24, 8]) / (batch[:, 1, 24, 39] - batch[:, 1, 24, 8])
    area = down * right.abs()
    assert (down > 0).all()  # never upside down
    torch.testing.assert_close(down, right.abs(), rtol=1e-2, atol=1e-2)  # nor stretched
    assert SMALLEST - 0.01 < float(area.min()) < SMALLEST + 0.03
    assert 0.97 < float(area.max()) < 1.01
    assert 0.4 < float((right < 0).float().mean()) < 0.6
    assert float(view[:, :2, centre, centre].abs().max()) <= 1.01  # nothing from beyond the image
    # Nor anything mirrored at an edge: the ramps are straight from end to end.
    for ramp in (view[:, 0, :, 24], view[:, 1, 24, :]):
        middle = (ramp[:, 23] + ramp[:, 24]) / 2
        torch.testing.assert_close((ramp[:, 3] + ramp[:, 44]) / 2, middle, rtol=0, atol=0.02)
    places = view[:, 0, 24, 24]
    assert float(places.std()) > 0.05  # at different heights


def test_constant_images_stay_constant() -> None:
    flat = torch.full((5, 3, 32, 32), 0.7)
    torch.testing.assert_close(with_views([flat], 3)[2], flat)


def test_the_same_twice() -> None:
    torch.manual_seed(0)
    first = with_views([images(3)], 3)
    torch.manual_seed(1)
    second = with_views([images(3)], 3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], first[2])
