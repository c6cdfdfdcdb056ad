"""More views of the same calibration images: mirrored crops, so that rounding is fitted to more than 200 pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 0.35  # of the image's area


def with_views(batches: Sequence[Tensor], views: int) -> list[Tensor]:
    """The batches, followed by `views` - 1 others of each image: a random crop, resized back, mirrored half the time.

    Args:
        batches: images (B, 3, S, S).
        views: of each image, itself included.
    """
    generator = torch.Generator().manual_seed(0)
    made = list(batches)
    for _ in range(views - 1):
        made.extend(_crops(batch, generator) for batch in batches)
    return made


def _crops(images_B3SS: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(len(images_B3SS), 4, generator=generator)
    side = (SMALLEST + (1 - SMALLEST) * drawn[:, 0]).sqrt()
    mirrored = torch.where(drawn[:, 3] < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(images_B3SS), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirrored, side
    theta[:, :, 2] = (2 * drawn[:, 1:3] - 1) * (1 - side).unsqueeze(1)
    grid = F.affine_grid(theta.to(images_B3SS), list(images_B3SS.shape), align_corners=False)
    return F.grid_sample(images_B3SS, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
