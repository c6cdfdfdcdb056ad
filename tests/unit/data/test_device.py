from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from vit_efficient.data.config import AugmentConfig
from vit_efficient.data.device import DeviceTransforms, draw_cut, erase
from vit_efficient.data.image import ImageSpec

CLASSES = 5


def batch(count: int = 6, size: int = 8, **extra: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(count)
    return {
        "image": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
        "label": torch.arange(count) % CLASSES,
        "weight": torch.ones(count),
        "step": 3,
        "micro": 0,
        **extra,
    }


def test_normalisation(image: ImageSpec) -> None:
    given = batch()
    images, targets = DeviceTransforms(image, CLASSES)(given)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (image.mean, image.std))
    torch.testing.assert_close(images, (given["image"].float() / 255 - mean) / std, rtol=0, atol=2e-6)
    assert images.dtype == torch.float32
    assert torch.equal(targets, functional.one_hot(given["label"], CLASSES).float())


def test_label_smoothing_is_that_of_cross_entropy(image: ImageSpec) -> None:
    given = batch()
    _, targets = DeviceTransforms(image, CLASSES, label_smoothing=0.1)(given)
    logits = torch.randn(6, CLASSES)
    expected = functional.cross_entropy(logits, given["label"], label_smoothing=0.1)
    torch.testing.assert_close(functional.cross_entropy(logits, targets), expected)


def test_evaluation_augments_nothing(image: ImageSpec) -> None:
    augment = AugmentConfig(mixup=1.0, cutmix=1.0, erasing=1.0)
    transforms = DeviceTransforms(image, CLASSES, augment, label_smoothing=0.1).eval()
    given = batch(erase=torch.tensor([[0, 0, 4, 4]] * 6))
    images, targets = transforms(given)
    plain, hard = DeviceTransforms(image, CLASSES)(batch())
    assert torch.equal(images, plain)
    assert torch.equal(targets, hard)


def test_nothing_to_save_and_nothing_that_a_cast_can_spoil(image: ImageSpec) -> None:
    transforms = DeviceTransforms(image, CLASSES)
    before, _ = transforms(batch())
    assert transforms.state_dict() == {}
    after, _ = transforms.to(torch.bfloat16)(batch())
    assert torch.equal(before, after)


def test_mixup(image: ImageSpec) -> None:
    given = batch()
    plain, hard = DeviceTransforms(image, CLASSES)(given)
    images, targets = DeviceTransforms(image, CLASSES, AugmentConfig(mixup=0.8), seed=4)(given)
    assert not torch.equal(images, plain)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    share = targets.masked_select(hard.bool()).min()  # of rows whose partner has another label
    for row in range(6):
        errors = [(images[row] - (plain[row] * share + plain[other] * (1 - share))).abs().max() for other in range(6)]
        assert min(errors) < 1e-5
        partner = int(torch.stack(errors).argmin())
        torch.testing.assert_close(targets[row], hard[row] * share + hard[partner] * (1 - share))


def test_cutmix_targets_are_the_areas(image: ImageSpec) -> None:
    mixed = 0
    for step in range(20):
        given = batch(step=step)
        plain, hard = DeviceTransforms(image, CLASSES)(given)
        images, targets = DeviceTransforms(image, CLASSES, AugmentConfig(cutmix=1.0))(given)
        for row in range(6):
            kept = (images[row] == plain[row]).all(0).float().mean()
            share = (targets[row] * hard[row]).sum()
            if share < 1:  # the partner has another label
                torch.testing.assert_close(kept, share, rtol=0, atol=0.02)
                mixed += 1
    assert mixed > 40


def test_draws_depend_on_seed_step_and_micro_batch_alone(image: ImageSpec) -> None:
    augment = AugmentConfig(mixup=0.8, cutmix=1.0)

    def run(seed: int = 0, **extra: Any) -> torch.Tensor:
        return DeviceTransforms(image, CLASSES, augment, seed=seed)(batch(**extra))[0]

    first = run()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(run(), first)
    assert torch.equal(torch.get_rng_state(), state)
    for other in (run(seed=1), run(step=4), run(micro=1)):
        assert not torch.equal(other, first)


def test_with_both_each_step_draws_one_for_all_ranks(image: ImageSpec) -> None:
    transforms = DeviceTransforms(image, CLASSES, AugmentConfig(mixup=0.8, cutmix=1.0))
    kinds = [transforms._draws_cutmix(step) for step in range(400)]
    assert 150 < sum(kinds) < 250
    plain = transforms.normalise(batch()["image"])
    for step in (kinds.index(True), kinds.index(False)):
        for micro in range(3):
            images, _ = transforms(batch(step=step, micro=micro))
            copied = (images[:, None] == plain[None]).all(2).any(1)  # a pixel of some image, unmixed
            assert bool(copied.all()) == kinds[step]


def test_fillers_mix_into_nobody(image: ImageSpec) -> None:
    weight = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    for augment in (AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0)):
        for step in range(20):
            _, targets = DeviceTransforms(image, CLASSES, augment)(batch(weight=weight, step=step))
            assert targets[:2, 2:].abs().sum() == 0  # labels 2 to 4 are those of fillers


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0), AugmentConfig()])
def test_a_single_image(image: ImageSpec, augment: AugmentConfig) -> None:
    images, targets = DeviceTransforms(image, CLASSES, augment)(batch(1))
    plain, hard = DeviceTransforms(image, CLASSES)(batch(1))
    torch.testing.assert_close(images, plain)
    torch.testing.assert_close(targets, hard)


def test_erase() -> None:
    images = torch.ones(3, 3, 4, 5)
    erased = erase(images, torch.tensor([[1, 2, 3, 1], [0, 0, 0, 0], [0, 0, 5, 4]]))
    expected = torch.ones(4, 5)
    expected[2, 1:4] = 0
    assert torch.equal(erased[0], expected.expand(3, 4, 5))
    assert torch.equal(erased[1], images[1])
    assert erased[2].abs().sum() == 0


def test_erased_pixels_are_the_mean(image: ImageSpec) -> None:
    given = batch(erase=torch.tensor([[0, 0, 8, 8]] * 6))
    images, _ = DeviceTransforms(image, CLASSES, AugmentConfig(erasing=1.0))(given)
    assert images.abs().sum() == 0


def test_cut_boxes_stay_inside() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.3, 1.0):
        for _ in range(50):
            x0, y0, x1, y1 = draw_cut(rng, share, 6, 9)
            assert 0 <= x0 <= x1 <= 9
            assert 0 <= y0 <= y1 <= 6
