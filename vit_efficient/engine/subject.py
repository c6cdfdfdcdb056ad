"""The model that `evaluate` is asked about: a shipped file, a checkpoint, or weights quantized without training."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.base import given_base, has_adapters
from vit_efficient.engine.calibration import calibrate_model, needs_calibration
from vit_efficient.engine.checkpoint import read_checkpoint
from vit_efficient.engine.deployed import load_file
from vit_efficient.engine.pretrained import require_trained_head
from vit_efficient.engine.resume import differing_keys
from vit_efficient.engine.rundir import MODEL, RunDir
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.machine import rank
from vit_efficient.model.build import build_model, compute_dtype
from vit_efficient.model.origin import check_same_base
from vit_efficient.parallel.folder import is_folder
from vit_efficient.quantization.deploy import deployed_state
from vit_efficient.recipe.schema import Recipe

log = logging.getLogger(__name__)


@dataclass
class Subject:
    """A model in deployed form, on the CPU, and what is said of it."""

    model: nn.Module
    image: ImageSpec
    parameters: int
    weight_bytes: int
    lines: list[str]


def find(target: str, word: str = "--checkpoint") -> tuple[Path, Path | None]:
    """The model file or checkpoint that ``--checkpoint`` means, and what holds its recipe: a model file does itself.

    Args:
        target: a run's folder, its model file, or a checkpoint.
        word: of the command line that named it, for messages.

    Raises:
        CheckpointError: there is nothing to evaluate at that path, or all of it is damaged.
    """
    path = Path(target)
    if path.is_dir() and not is_folder(path):
        run = RunDir(path)
        found = run.model if run.finished and run.model.is_file() else run.whole_checkpoint(_warn)
        if found is None:
            raise CheckpointError(f"{word} {target}: neither {MODEL} nor a checkpoint is in that folder.")
        path = found
    elif not path.exists():
        raise CheckpointError(f"{word} {target}: there is no such file or run folder.")
    elif path.suffix == ".safetensors":
        return path, path
    for folder in (path.parent, path.parent.parent):
        if (recipe := RunDir(folder).recipe).is_file():
            return path, recipe
    return path, None


def _warn(line: str) -> None:
    if rank() == 0:
        log.warning(line)


def _must_match(saved: Recipe, now: Recipe, path: Path) -> None:
    """What makes the model must agree; data, hardware and attention kernel may differ."""
    owned: Any = {"model": {"name", "image_size", "kwargs"}, "quantization": True}
    a, b = (
        r.model_dump(mode="json", include=owned, exclude={"quantization": {"precision", "base", "distill"}})
        for r in (saved, now)
    )
    if rows := differing_keys(a, b):
        raise CheckpointError(
            f"{path} belongs to another recipe:\n" + "\n".join(f"    {row}" for row in rows) + "\n"
            "  Leave `--recipe` out to evaluate it as it was trained."
        )


def from_checkpoint(path: Path, recipe: Recipe, num_classes: int) -> Subject:
    """Load a deployed file or one of our checkpoints.

    Raises:
        CheckpointError: damaged, hostile, or of another recipe.
    """
    if path.suffix == ".safetensors":
        deployed = load_file(path, attention=recipe.attention)
        _must_match(deployed.recipe, recipe, path)
        size = path.stat().st_size
        return Subject(deployed.model, deployed.image, deployed.parameters, size, [f"{path}, as it ships"])
    checkpoint = read_checkpoint(path)
    saved = Recipe.model_validate(checkpoint["vit_efficient"]["recipe"])
    _must_match(saved, recipe, path)
    base = _base_of(checkpoint, saved, recipe, path) if has_adapters(saved) else None
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
    torch.manual_seed(saved.run.seed)
    built = build_model(plain, num_classes, base=base)
    if base is not None:
        check_same_base(checkpoint.get("base"), built.origin, str(path))
    state = {name.removeprefix("model."): tensor for name, tensor in checkpoint["state_dict"].items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("metrics.", "transforms."))}
    state |= checkpoint.get("average", {}).get("average", {})
    try:
        missing, unexpected = built.model.load_state_dict(state, strict=base is None)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the recipe's model: {error}") from error
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    if unexpected or (lost := trained & set(missing)):
        raise CheckpointError(f"{path} does not fit the recipe's model: {[*unexpected, *sorted(lost)][:5]}")
    return _finalized(built.model, recipe, built.image, built.parameters, [f"{path}", *built.report.lines()])


def _base_of(checkpoint: dict[str, Any], saved: Recipe, now: Recipe, path: Path) -> str:
    """Where the base of a checkpoint's adapters is: where the recipe says now, else where it was.

    Raises:
        CheckpointError: nowhere.
    """
    if (named := getattr(now.quantization, "base", None)) is not None:
        return str(named)
    recorded = (checkpoint.get("base") or {}).get("source")
    if recorded is not None and Path(recorded).is_file():
        return str(recorded)
    found = given_base(saved)
    if found is None:
        raise CheckpointError(
            f"{path} holds adapters only, and their base {recorded or ''} is gone. "
            "Give it as `quantization.base=`, or train again."
        )
    return found.weights


def from_weights(
    recipe: Recipe, num_classes: int, data: ViTDataModule | None = None, console: Console | None = None
) -> Subject:
    """The pretrained ``model.weights`` under the recipe's quantization, with no training.

    Args:
        recipe: resolved.
        num_classes: outputs of the head.
        data: gives the training images that calibration needs, where the quantization wants it.
        console: shows how far that is.

    Raises:
        UserError: it must be calibrated, and there are no training images; the weights have no head for these classes.
    """
    torch.manual_seed(recipe.run.seed)
    built = build_model(recipe, num_classes, base=getattr(recipe.quantization, "base", None))
    require_trained_head(built.fresh_head, recipe)
    lines = [f"{recipe.model.weights}, quantized without training", *built.report.lines(), *built.notes]
    if needs_calibration(recipe):
        if data is None:
            raise UserError(
                f"quantization={recipe.quantization.name} must be calibrated on images first: "
                "`python -m vit_efficient.quantize --recipe R data.shards=... --out MODEL` does it."
            )
        lines += calibrate_model(recipe, built.model, data, built.image, console or Console(quiet=True))
    return _finalized(built.model, recipe, built.image, built.parameters, lines)


def _finalized(model: nn.Module, recipe: Recipe, image: ImageSpec, parameters: int, lines: list[str]) -> Subject:
    recipe.quantization.finalize(model)
    tensors, _ = deployed_state(model, compute_dtype(recipe))
    return Subject(model.eval(), image, parameters, sum(t.nbytes for t in tensors.values()), lines)
