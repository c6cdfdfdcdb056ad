"""Counts how good a model is: every sample of the evaluation shards, once."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import nn

from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.device import DeviceTransforms
from vit_efficient.engine.pretrained import require_labels
from vit_efficient.engine.trainer import build_trainer
from vit_efficient.measure.memory import weight_bytes
from vit_efficient.model.metrics import ClassificationMetrics
from vit_efficient.parallel.config import replicated
from vit_efficient.recipe.schema import Recipe


class Evaluation(L.LightningModule):
    """Runs a model over the evaluation set under the recipe's precision."""

    def __init__(self, model: nn.Module, transforms: DeviceTransforms, num_classes: int) -> None:
        super().__init__()
        self.model, self.transforms = model, transforms
        self.metrics = ClassificationMetrics(num_classes)
        self.figures: dict[str, Any] = {}
        self.weight_bytes = 0
        self.device_used = torch.device("cpu")

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images, _ = self.transforms(batch)
        self.metrics.update(self.model(images), batch["label"], batch["weight"])

    def on_validation_epoch_end(self) -> None:
        self.figures = self.metrics.compute()
        self.device_used = self.device
        self.weight_bytes = weight_bytes(self.model)


# Schemes whose deployed layers multiply codes.
OF_CODES = ("int8", "fp8")


def speed_up(model: nn.Module, recipe: Recipe) -> list[str]:
    """Fuse the blocks of a deployed model where its layers have codes to hand on, in place; else nothing.

    Returns:
        Lines for a person to read.
    """
    if recipe.quantization.name not in OF_CODES:
        return []
    from vit_efficient.model.fused import fuse_blocks

    return fuse_blocks(model.eval()).lines()


def evaluate_model(
    model: nn.Module,
    datamodule: ViTDataModule,
    transforms: DeviceTransforms,
    recipe: Recipe,
    callbacks: list[Any] | None = None,
) -> tuple[dict[str, Any], int, torch.device]:
    """Figures of ``model`` on the evaluation shards (see `ClassificationMetrics.compute`).

    Args:
        model: (B, 3, S, S) to (B, C).
        datamodule: gives the evaluation batches.
        transforms: normalises them on the device.
        recipe: resolved; its hardware and precision are used.
        callbacks: for example a progress display.

    Returns:
        The figures, the bytes of the weights on the device, and that device.

    Raises:
        UserError: the model has other classes than the data, or the data has one alone.
    """
    require_labels(getattr(model, "num_classes", None), datamodule)
    recipe = recipe.model_copy(update={"strategy": replicated(recipe.strategy)})
    trainer = build_trainer(recipe, run_dir=None, callbacks=callbacks or [])
    module = Evaluation(model.eval(), transforms, datamodule.num_classes)
    # Every process holds the same file's tensors, and gloo cannot send some of them (fp8).
    module._ddp_params_and_buffers_to_ignore = list(module.state_dict())  # type: ignore[assignment]
    with torch.no_grad():
        trainer.validate(module, datamodule=datamodule, verbose=False)
    return module.figures, module.weight_bytes, module.device_used
