"""Distillation: a frozen full-precision teacher, which the trained model is to answer like.

Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015, arXiv:1503.02531). The teacher sees the
very batch that the student sees, augmented and mixed. B images, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_efficient.attention.swap import swap_attention
from vit_efficient.data.image import ImageSpec
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.model.backbone import create_backbone
from vit_efficient.model.build import compute_dtype, for_speed
from vit_efficient.model.weights import is_quantized, locate
from vit_efficient.parallel.order import prepare_blocks
from vit_efficient.quantization.base import DistillConfig
from vit_efficient.recipe.load import load_recipe
from vit_efficient.recipe.schema import ModelConfig, Recipe

BASE = "base"
KEY = "quantization.distill.teacher"


def soft_losses(logits_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(logits / T))`` of each image, in float32.

    The factor keeps the size of the gradients from falling with T (section 2.1 of the paper).

    Args:
        logits_BC: the student's.
        teacher_BC: the teacher's; no gradient goes there.
        temperature: T.

    Returns:
        (B,), float32.
    """
    student_BC = F.log_softmax(logits_BC.float() / temperature, dim=1)
    target_BC = F.log_softmax(teacher_BC.detach().float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student_BC, target_BC, reduction="none", log_target=True).sum(dim=1)


class Teacher:
    """A frozen model and how much its answers weigh.

    Not an `nn.Module`, on purpose: so it is in no checkpoint, optimizer, moving average or gradient reduction of the
    module that holds it, and `train()` does not reach it.

    Args:
        model: (B, 3, S, S) to (B, C), in full precision; becomes frozen and stays in evaluation mode.
        config: temperature and weight.
        source: where its weights came from, for messages.
        digest: sha256 of their file; a resumed run must have the same.
    """

    def __init__(self, model: nn.Module, config: DistillConfig, *, source: str, digest: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = config
        self.source, self.digest = source, digest
        self._device: torch.device | None = None

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the student's own images (B, 3, S, S), under the autocast that is on."""
        if self._device != images.device:
            self.model.to(images.device)
            self._device = images.device
        return self.model(images)

    def losses(self, logits_BC: Tensor, images: Tensor) -> Tensor:
        """`soft_losses` (B,) of the student's logits."""
        return soft_losses(logits_BC, self.logits(images), self.config.temperature)

    def blend(self, hard_B: Tensor, soft_B: Tensor) -> Tensor:
        """``(1 - alpha) hard + alpha soft``."""
        return (1 - self.config.alpha) * hard_B + self.config.alpha * soft_B

    def state(self) -> dict[str, str]:
        """What a checkpoint records of it."""
        return {"source": self.source, "sha256": self.digest}

    def check_same(self, saved: dict[str, str] | None) -> None:
        """Refuse to go on under another teacher than the checkpoint's.

        Raises:
            CheckpointError: the file has changed since.
        """
        if saved is None or saved["sha256"] == self.digest:
            return
        raise CheckpointError(
            f"{KEY}: {self.source} has sha256 {self.digest[:12]}..., and the checkpoint was trained with "
            f"{saved['source']} of sha256 {saved['sha256'][:12]}.... Put that file back, or start afresh."
        )

    def __str__(self) -> str:
        weight, temperature = self.config.alpha, self.config.temperature
        return f"{self.source} (sha256 {self.digest[:12]}), alpha {weight:g}, temperature {temperature:g}"


def find_teacher(recipe: Recipe, base: str | None = None) -> str | None:
    """The weights that ``distill.teacher`` means; None without distillation, or where the base is yet to be trained.

    Args:
        recipe: resolved.
        base: weights that adapters start from, once they are known.

    Raises:
        UserError: there are none, or nothing is at that path.
    """
    distill = _config(recipe)
    if distill is None:
        return None
    spec = distill.teacher
    if spec == BASE:
        found = base or getattr(recipe.quantization, "base", None) or recipe.model.weights
        if found is None and getattr(recipe.quantization, "lora", None) is None:
            raise UserError(
                f"{KEY}=base: `model.weights` is unset, so there is no trained model in full precision to learn from. "
                f"Set model.weights, or {KEY} to a weight file or to the folder of an fp32 run."
            )
        return found
    if not _from_hub(spec):
        locate(spec, key=KEY)
    return spec


def build_teacher(recipe: Recipe, image: ImageSpec, num_classes: int, *, base: str | None = None) -> Teacher | None:
    """The teacher that a recipe asks for, or None.

    A weight file is loaded into the recipe's own model; a run's folder says itself which model it is of, so a teacher
    may be larger than its student. The head and every embedding must fit as they are.

    Args:
        recipe: resolved; its attention, precision and compilation are the teacher's too.
        image: what the student takes.
        num_classes: of the data.
        base: weights that adapters start from.

    Raises:
        UserError: there is no such teacher, or it has other classes, another input or quantized weights.
    """
    spec, distill = find_teacher(recipe, base), _config(recipe)
    if spec is None or distill is None:
        return None
    path = Path(spec) if _from_hub(spec) else locate(spec, key=KEY)
    if not _from_hub(spec) and is_quantized(str(path)):
        raise CheckpointError(
            f"{KEY}: {path} is quantized. A teacher is a trained model in full precision: a weight file, or an fp32 "
            "run's folder."
        )
    config = _model_config(recipe, spec).model_copy(update={"weights": str(path), "num_classes": num_classes})
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn and thrown away: not from the run's numbers
            backbone = create_backbone(config, num_classes)
    except UserError as error:
        raise CheckpointError(
            f"{KEY}: {error}\n  A teacher is a trained model in full precision: a weight file, or an fp32 run's folder."
        ) from error
    if backbone.changes:
        raise CheckpointError(
            f"{KEY}: {path} does not fit this run as it is: {'; '.join(backbone.changes)}. "
            f"A teacher must have been trained on the same {num_classes} classes and {image.size} px."
        )
    own, student = ((spec.size, spec.mean, spec.std) for spec in (backbone.image, image))
    if own != student:
        raise CheckpointError(
            f"{KEY}: {path} takes images of {_described(backbone.image)}, and this run's are of {_described(image)}. "
            "Teacher and student see the same batch: take a teacher of the same input."
        )
    assert backbone.weights_digest is not None, "weights were given"
    return Teacher(_prepared(backbone.model, recipe), distill, source=str(path), digest=backbone.weights_digest)


def _prepared(model: Any, recipe: Recipe) -> nn.Module:
    """The recipe's attention, precision and compilation, as the student has them."""
    for_speed(model)
    swap_attention(model, recipe.attention.build())
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):  # as autocast would round them in every step
            module.to(compute_dtype(recipe))
    prepare_blocks(model.blocks, checkpointing=False, compile=recipe.strategy.compile)
    return model


def _model_config(recipe: Recipe, spec: str) -> ModelConfig:
    described = Path(spec).expanduser() / "recipe.yaml"
    return load_recipe(str(described)).recipe.model if described.is_file() else recipe.model


def _config(recipe: Recipe) -> DistillConfig | None:
    return getattr(recipe.quantization, "distill", None)


def _from_hub(spec: str) -> bool:
    return spec == "timm" or spec.startswith("timm:")


def _described(image: ImageSpec) -> str:
    return f"{image.size} px, mean {image.mean}, std {image.std}"
