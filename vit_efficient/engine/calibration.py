"""Calibration in a run: training images for it, the device it runs on, and what a checkpoint makes needless."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vit_efficient.attention.padding import unpadded
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.bars import progress
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.device import DeviceTransforms
from vit_efficient.data.image import ImageSpec
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.recipe.schema import Recipe

BATCH = 64  # images at once

Progress = Callable[[int, int], None]


def needs_calibration(recipe: Recipe) -> bool:
    """Whether the recipe's quantization wants images before the model can answer."""
    return bool(getattr(recipe.quantization, "needs_calibration", False))


def training_device(recipe: Recipe) -> torch.device:
    """Where this process of a resolved recipe trains."""
    if recipe.strategy.accelerator != "gpu":
        return torch.device("cpu")
    local = next((int(os.environ[name]) for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), 0)
    return torch.device("cuda", local % torch.cuda.device_count())  # a launcher may show each process its own GPU only


def calibration_batches(
    recipe: Recipe,
    data: ViTDataModule,
    image: ImageSpec,
    samples: int,
    device: torch.device,
    report: Progress = lambda done, total: None,
) -> tuple[list[Tensor], Tensor]:
    """Training images, resized, cropped and normalised as in evaluation.

    Which ones depends on the manifest, ``run.seed`` and `samples` only: every rank has the same.

    Args:
        recipe: resolved.
        data: with training shards.
        image: what the model expects.
        samples: how many; all there are, if there are fewer.
        device: where they are wanted.
        report: called with (images read, images in all).

    Returns:
        Batches (B, 3, S, S) float32 of at most 64, and the labels (images,) int64, both on the device.

    Raises:
        UserError: there are no training shards, or no image in them can be read.
        DataError: an image cannot be read (unless ``data.on_error`` is ``skip``, which leaves it out).
    """
    if data.train_manifest is None:
        raise UserError(
            f"quantization={recipe.quantization.name} is calibrated on training images here, and data.shards is unset. "
            "Set data.shards; or calibrate once with `python -m vit_efficient.quantize --recipe R data.shards=... "
            "--out MODEL`, and evaluate that file: `--checkpoint MODEL`."
        )
    wanted = min(samples, data.train_images)
    stream = data.calibration_stream(image, samples, BATCH)
    transforms = DeviceTransforms(image, data.num_classes).eval()
    batches: list[Tensor] = []
    labels: list[Tensor] = []
    with stream.reader:
        for step in range(-(-wanted // BATCH)):
            batch = stream.micro_batch(step, 0)
            batch["image"], batch["label"] = batch["image"].to(device), batch["label"].to(device)
            images, _ = transforms(batch)
            # Left out: what could not be read, and what the last batch has beyond the number asked for.
            good = ((batch["weight"] > 0) & (batch["position"] < wanted)).to(device)
            if bool(good.any()):
                batches.append(images[good])
                labels.append(batch["label"][good])
            report(min((step + 1) * BATCH, wanted), wanted)
    if not batches:
        raise UserError(
            f"There is no training image to calibrate on: {wanted} of {data.train_images} were tried. "
            "Check the shards: `python -m vit_efficient.prepare --verify DIR`."
        )
    return batches, torch.cat(labels)


def calibrate_model(
    recipe: Recipe, model: nn.Module, data: ViTDataModule, image: ImageSpec, console: Console
) -> list[str]:
    """Calibrate a model as `build_model` left it, in float32 on the device that it will be trained on, in place.

    Afterwards it is on the CPU, and its steps are parameters where the recipe has them learned. Deterministic, so
    each rank does it for itself.

    Returns:
        Lines for a person to read.

    Raises:
        UserError: no images, too few of them, or layers that cannot be calibrated on them.
    """
    from vit_efficient.quantization.calibrate import calibrate
    from vit_efficient.quantization.calibration import CalibrationConfig
    from vit_efficient.quantization.int8_layers import learn_scales

    quantization: Any = recipe.quantization
    config = quantization.calibration or CalibrationConfig()
    device = training_device(recipe)
    with progress(console, "images") as shown:
        batches, _ = calibration_batches(
            recipe, data, image, config.samples, device, lambda done, total: shown("calibration images", done, total)
        )
    model.to(device)
    with (
        progress(console, "groups of layers") as shown,
        torch.autocast(device.type, enabled=False),
        _float32_attention(model),
        unpadded(model),
    ):
        done = calibrate(model, batches, config, progress=lambda done, total: shown("calibration", done, total))
    model.cpu()
    if getattr(quantization, "learn_scales", False):
        learn_scales(model)
    return done.lines()


@contextmanager
def _float32_attention(model: nn.Module) -> Iterator[None]:
    """While it lasts, what attends in floating point does so through SDPA: the recipe's own may want half precision."""
    from vit_efficient.quantization.int8_attention import attention_modules, code_attention

    own: list[tuple[Any, str, Any]] = []
    on_codes = code_attention(model)
    for key, module in attention_modules(model).items():
        holder, name = (module.backend, "plain") if key in on_codes else (module, "backend")
        own.append((holder, name, getattr(holder, name)))
    try:
        for holder, name, _ in own:
            setattr(holder, name, SdpaConfig().build())
        yield
    finally:
        for holder, name, backend in own:
            setattr(holder, name, backend)


def restore(model: nn.Module, checkpoint: Mapping[str, Any], path: str) -> None:
    """Give a model as `build_model` left it the form and the weights of a checkpoint, instead of calibrating it.

    Lightning will load the same weights again; the form must be there before the optimizer is.

    Args:
        model: changed in place.
        checkpoint: of `read_checkpoint`.
        path: its name, for messages.

    Raises:
        CheckpointError: the weights do not fit.
    """
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("model.")
    }
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # how torch reports names and shapes that differ
        raise CheckpointError(f"{path} does not fit the recipe's model: {error}") from error
