"""Post-training quantization of a pretrained model: build, calibrate, compare with full precision, write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from vit_efficient.bars import progress
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.calibration import (
    calibrate_model,
    calibration_batches,
    needs_calibration,
    training_device,
)
from vit_efficient.engine.deployed import load_file, save_deployed
from vit_efficient.engine.evaluation import speed_up
from vit_efficient.engine.pretrained import labelled, require_trained_head
from vit_efficient.engine.sensitivity import choose_keep, run_sensitivity
from vit_efficient.engine.setup import build_data, build_transforms
from vit_efficient.errors import UserError
from vit_efficient.measure.logits import LogitComparison, PairedDrop, compare, paired_drop
from vit_efficient.measure.memory import weight_bytes
from vit_efficient.model.build import Built, build_backbone, build_model, compute_dtype
from vit_efficient.model.origin import Origin
from vit_efficient.model.weights import is_quantized
from vit_efficient.quantization.base import AutoKeep, Report
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.recipe.schema import Recipe


@dataclass
class Subject:
    """A pretrained model, in full precision on the device, and the data that it is quantized with."""

    recipe: Recipe
    model: nn.Module
    image: ImageSpec
    data: ViTDataModule
    device: torch.device
    parameters: int
    notes: list[str]
    """How the weights came to fit, for a person to read."""

    @property
    def labelled(self) -> bool:
        """Whether the data's labels are the model's classes; a drop is one of agreement where they are not."""
        return labelled(self.recipe, self.data)


@dataclass
class Quantized:
    """A quantized model, and how it came about."""

    recipe: Recipe
    model: nn.Module
    report: Report
    lines: list[str]
    origin: Origin
    """The weights that it was made of."""


@dataclass
class Comparison:
    """The written file beside the model that it was made of, on the same images; `drop` is None without labels."""

    logits: LogitComparison
    drop: PairedDrop | None
    file_bytes: int
    device_bytes: int
    fp32_bytes: int

    def figures(self) -> dict[str, Any]:
        """For `--output`."""
        drop, top1 = self.drop, {}
        if drop is not None:
            top1 = {
                "top1": drop.top1,
                "top1_reference": drop.top1_reference,
                "top1_drop": drop.drop,
                "top1_drop_interval": [drop.low, drop.high],
            }
        return {
            "samples": self.logits.n,
            **top1,
            "agreement": self.logits.agreement,
            "kl": self.logits.kl,
            "snr_db": self.logits.snr_db,
            "weight_bytes": self.file_bytes,
            "device_bytes": self.device_bytes,
            "fp32_bytes": self.fp32_bytes,
        }


def load_subject(recipe: Recipe) -> Subject:
    """The full-precision model of a resolved recipe with its pretrained weights.

    Raises:
        UserError: no weights, the recipe quantizes nothing or trains adapters, or weights and data do not fit: the
            weights' head has other classes than the model is asked for, and would be a random one.
    """
    quantization: Any = recipe.quantization
    if quantization.name == "none":
        raise UserError(
            "quantize: the recipe has quantization=none, so there is nothing to do. Choose another variant."
        )
    if getattr(quantization, "lora", None) is not None:
        raise UserError(
            f"quantize: quantization={quantization.name} comes with adapters to train. Set quantization.lora=null to "
            "quantize without training, or train it: `python -m vit_efficient.fit`."
        )
    if not (recipe.model.weights or getattr(quantization, "base", None)):
        raise UserError("quantize: there is no trained model to quantize. Give it as `model.weights=` (a file).")
    weights = getattr(quantization, "base", None) or recipe.model.weights  # as `build_model` takes them
    if is_quantized(weights):
        raise UserError(
            f"quantize: {weights} is quantized already, and would be taken for full precision. Give the float weights "
            "that it was made of."
        )
    data = build_data(recipe)
    torch.manual_seed(recipe.run.seed)
    backbone = build_backbone(recipe.model.model_copy(update={"weights": weights}), recipe, data.num_classes)
    require_trained_head(backbone.fresh_head, recipe)
    model, data.image, device = backbone.model, backbone.image, training_device(recipe)
    parameters = sum(p.numel() for p in model.parameters())
    model = model.eval().requires_grad_(False).to(device)
    return Subject(recipe, model, backbone.image, data, device, parameters, backbone.notes)


def quantize(subject: Subject, console: Console) -> Quantized:
    """Quantize the subject's model as its recipe says, `keep: auto` resolved; in deployed form, on the device."""
    recipe, quantization = subject.recipe, subject.recipe.quantization
    lines = []
    if getattr(quantization, "keep", None) == "auto":
        keep = _choose_keep(subject, console)
        update = {"keep": keep, "budget": None}
        recipe = recipe.model_copy(update={"quantization": quantization.model_copy(update=update)})
        lines.append(f"keep: auto became {', '.join(keep) or 'nothing'}")
    built = _build(subject, recipe)
    if needs_calibration(recipe):
        lines += calibrate_model(recipe, built.model, subject.data, subject.image, console)
    recipe.quantization.finalize(built.model)
    assert built.origin is not None, "`load_subject` wants weights"
    return Quantized(recipe, built.model.eval().to(subject.device), built.report, lines, built.origin)


def _build(subject: Subject, recipe: Recipe) -> Built:
    torch.manual_seed(recipe.run.seed)
    built = build_model(recipe, subject.data.num_classes, base=getattr(recipe.quantization, "base", None))
    built.model.eval()
    return built


def _choose_keep(subject: Subject, console: Console) -> tuple[str, ...]:
    quantization: Any = subject.recipe.quantization
    everything = () if quantization.name in ("int8", "fp8") else ("patch_embed",)  # convolutions have no other form
    update = {"keep": everything, "budget": None}
    recipe = subject.recipe.model_copy(update={"quantization": quantization.model_copy(update=update)})
    quantized = quantize(Subject(**{**vars(subject), "recipe": recipe}), console)
    batches, labels = _calibration_images(subject)
    with _precision(subject):
        chosen = choose_keep(
            subject.model, quantized.model, batches, labels, quantization.budget or AutoKeep(), console,
            dtype=compute_dtype(recipe),
        )  # fmt: skip
    return (*everything, *(name for name in chosen if name not in everything))


def sensitivity(subject: Subject, out: Path, console: Console) -> None:
    """Measure what each layer, role and block loses, on the calibration images; writes beside `out`."""
    quantized = quantize(subject, console)
    batches, labels = _calibration_images(subject)
    title = f"{subject.recipe.model.name}, {subject.recipe.quantization.name}"
    with _precision(subject):
        run_sensitivity(
            subject.model, quantized.model, batches, labels, out, console,
            title=title, dtype=compute_dtype(subject.recipe),
        )  # fmt: skip


def _calibration_images(subject: Subject) -> tuple[list[Tensor], Tensor | None]:
    """Calibration images in batches, and their labels where they are the model's classes."""
    config = getattr(subject.recipe.quantization, "calibration", None) or CalibrationConfig()
    batches, labels = calibration_batches(subject.recipe, subject.data, subject.image, config.samples, subject.device)
    return batches, labels if subject.labelled else None


def _precision(subject: Subject) -> AbstractContextManager[Any]:
    """Autocast to the recipe's precision."""
    dtype = compute_dtype(subject.recipe)
    return nullcontext() if dtype == torch.float32 else torch.autocast(subject.device.type, dtype)


def write(subject: Subject, quantized: Quantized, out: Path) -> int:
    """Write the model file, and say in it where its weights came from; its size in bytes.

    Where the data has other classes than the model, the file's classes are called by their numbers.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    origin = quantized.origin
    on_disk = Path(origin.source).is_file()  # else it is a name on the hub, whose file has a hash all the same
    source = {"weights": Path(origin.source).name if on_disk else origin.source, "sha256": origin.sha256}
    names = subject.data.class_names
    if (classes := subject.recipe.model.num_classes) not in (None, len(names)):
        names = [str(number) for number in range(classes)]
    return save_deployed(out, quantized.model, quantized.recipe, names, source=source)


@torch.no_grad()
def compare_file(subject: Subject, out: Path, console: Console) -> Comparison:
    """The file, loaded afresh, beside the full-precision model: every evaluation image once.

    Full precision is float32; the file runs in the recipe's precision.
    """
    deployed = load_file(out, attention=subject.recipe.attention)
    model = deployed.model.to(subject.device)
    speed_up(model, subject.recipe)
    references, logits, labels = [], [], []
    with progress(console, "images") as report:
        for images, classes in evaluation_images(subject):
            references.append(subject.model(images).float().cpu())
            with _precision(subject):
                logits.append(model(images).float().cpu())
            labels.append(classes.cpu())
            report("compared", sum(map(len, labels)), subject.data.eval_images)
    reference_BC, logits_BC, labels_B = torch.cat(references), torch.cat(logits), torch.cat(labels)
    return Comparison(
        compare(reference_BC, logits_BC),
        paired_drop(labels_B, reference_BC, logits_BC) if subject.labelled else None,
        out.stat().st_size,
        weight_bytes(model),
        4 * subject.parameters,
    )


def evaluation_images(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised evaluation images (B, 3, S, S) and their labels (B,), on the device; each once."""
    transforms = build_transforms(subject.recipe, subject.image, subject.data.num_classes).eval()
    try:
        for batch in subject.data.val_dataloader():
            here = {
                key: value.to(subject.device) if isinstance(value, Tensor) else value for key, value in batch.items()
            }
            images, _ = transforms(here)
            real = here["weight"] > 0  # without the fillers of a last batch
            yield images[real], here["label"][real]
    finally:
        subject.data.teardown("validate")
