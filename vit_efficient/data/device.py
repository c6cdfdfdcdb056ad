"""What happens to a batch on its device: normalisation, erasing, mixup, cutmix, soft targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vit_efficient.data.config import AugmentConfig
from vit_efficient.data.counter import Domain, hash_int
from vit_efficient.data.deferred import DeferredImages, decode_on_device
from vit_efficient.data.image import ImageSpec


class DeviceTransforms(nn.Module):
    """Batch of the data module in, images and soft targets out; augments in training mode only.

    Mixup and cutmix are drawn from (seed, step, micro-batch): a resumed run draws the same. Fillers (weight 0) are
    mixed into nobody. No parameters, no state.

    Args:
        image: gives mean and std.
        num_classes: width of the targets.
        augment: None, or all zero: nothing but normalisation.
        label_smoothing: share of each target spread over all classes.
        seed: the run's.
    """

    def __init__(
        self,
        image: ImageSpec,
        num_classes: int,
        augment: AugmentConfig | None = None,
        *,
        label_smoothing: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.interpolation = image.interpolation
        self.label_smoothing = label_smoothing
        self.mixup = augment.mixup if augment else 0.0
        self.cutmix = augment.cutmix if augment else 0.0
        self.seed = seed
        # plain tensors, not buffers: a model cast to bf16, or made on the meta device, must not take them along
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (image.mean, image.std))
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Normalise, and in training augment.

        Args:
            batch: `image` uint8 (B, 3, S, S), `label` int64 (B,); in training also `weight`, `step`, `micro` and,
                if there is erasing, `erase` int64 (B, 4).

        Returns:
            images float32 (B, 3, S, S) and targets float32 (B, classes) whose rows sum to 1.
        """
        images = self.normalise(self.pixels(batch))
        smoothing = self.label_smoothing if self.training else 0.0
        targets = functional.one_hot(batch["label"], self.num_classes).to(torch.float32)
        targets = targets * (1 - smoothing) + smoothing / self.num_classes
        if not self.training:
            return images, targets
        if "erase" in batch:
            images = erase(images, batch["erase"])
        if self.mixup or self.cutmix:
            images, targets = self._mix(images, targets, batch["weight"], batch["step"], batch["micro"])
        return images, targets

    def pixels(self, batch: Mapping[str, Any]) -> Tensor:
        """uint8 (B, 3, S, S) of a batch; decodes what was left to the device."""
        images: Tensor = batch["image"]
        if "deferred" not in batch:
            return images
        deferred: DeferredImages = batch["deferred"]
        decoded = decode_on_device(deferred, images.device, self.interpolation, batch["key"])
        if not images.shape[0]:
            return decoded
        return images.index_copy(0, _without_waiting(np.asarray(deferred.rows), images.device), decoded)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) to float32 with the model's mean and std."""
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return torch.addcmul(self._shift, images.contiguous().to(torch.float32), self._scale)

    def _mix(self, images: Tensor, targets: Tensor, weight: Tensor, step: int, micro: int) -> tuple[Tensor, Tensor]:
        """Mixup (Zhang et al. 2017, eq. 1) or CutMix (Yun et al. 2019, eq. 1-2); one lambda a micro-batch."""
        count, _, height, width = images.shape
        key = np.array([hash_int(Domain.MIX, self.seed, step, micro), 0], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        partner = _without_waiting(rng.permutation(count), images.device)
        partner = torch.where(weight[partner] > 0, partner, torch.arange(count, device=images.device))
        if self._draws_cutmix(step):
            x0, y0, x1, y1 = draw_cut(rng, rng.beta(self.cutmix, self.cutmix), height, width)
            share = 1 - (x1 - x0) * (y1 - y0) / (height * width)
            patch = images[partner, :, y0:y1, x0:x1]
            images = images.clone()
            images[:, :, y0:y1, x0:x1] = patch
        else:
            share = rng.beta(self.mixup, self.mixup)
            images = images[partner].lerp(images, share)
        return images, targets[partner].lerp(targets, share)

    def _draws_cutmix(self, step: int) -> bool:
        if not (self.mixup and self.cutmix):
            return self.cutmix > 0
        return hash_int(Domain.MIX_KIND, self.seed, step) % 2 == 1


def _without_waiting(ids: np.ndarray, device: torch.device) -> Tensor:
    """On a device; a copy from memory that is not pinned would wait for all that a GPU has still to do."""
    here = torch.from_numpy(ids)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Zero a box in each image; zero is the mean after normalisation.

    Args:
        images: (B, 3, H, W).
        boxes: int64 (B, 4), x0 y0 width height; width 0 erases nothing.
    """
    height, width = images.shape[-2:]
    x0, y0, across, down = boxes.unbind(1)
    xs, ys = (torch.arange(size, device=images.device) for size in (width, height))
    inside_x = (xs >= x0[:, None]) & (xs < (x0 + across)[:, None])
    inside_y = (ys >= y0[:, None]) & (ys < (y0 + down)[:, None])
    return images.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)


def draw_cut(rng: np.random.Generator, share: float, height: int, width: int) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the box that the partner fills; its centre is anywhere, so the border may clip it."""
    side = float(np.sqrt(1 - share))
    half_width, half_height = int(width * side) // 2, int(height * side) // 2
    x, y = int(rng.integers(width)), int(rng.integers(height))
    return max(x - half_width, 0), max(y - half_height, 0), min(x + half_width, width), min(y + half_height, height)
