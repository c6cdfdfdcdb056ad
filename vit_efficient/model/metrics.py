"""Accuracy figures of a classifier, each sample counted once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from vit_efficient.errors import UserError


class ClassificationMetrics(nn.Module):
    """Top-1, top-5, macro F1, mean loss, accuracy of each class and the confusion matrix (torchmetrics).

    Samples of weight 0 (fillers that keep ranks in step, images that could not be read) do not count. Sums are kept
    per rank and added over ranks when computed.

    Args:
        num_classes: C. With fewer than five classes, "top-5" means top-C, which is always 1.

    Raises:
        UserError: there is one class alone.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError("The data has a single class, so there is nothing to tell apart. Give two classes or more.")
        self.num_classes = num_classes
        self.scores = MetricCollection(
            {
                "top1": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes)),
                "f1": MulticlassF1Score(num_classes, average="macro"),
                "per_class": MulticlassAccuracy(num_classes, average="none"),
                "confusion": MulticlassConfusionMatrix(num_classes),
            },
            compute_groups=False,
        )
        self.loss = MeanMetric()

    def update(self, logits_BC: Tensor, labels_B: Tensor, weight_B: Tensor) -> None:
        """Count one batch: logits (B, C), labels (B,), weight (B,) of 0 or 1."""
        counted = weight_B > 0
        logits, labels = logits_BC[counted].float(), labels_B[counted]
        if len(labels) == 0:
            return
        self.scores.update(logits, labels)
        losses = F.cross_entropy(logits, labels, reduction="none")
        self.loss.update(losses)

    def compute(self) -> dict[str, Any]:
        """Figures as Python numbers, fractions of 1; ``per_class`` (C,) and ``confusion`` (C, C) as CPU tensors.

        ``confusion[i, j]`` counts samples of class ``i`` taken for ``j``. A class without samples has accuracy NaN.
        """
        values = self.scores.compute()
        confusion = values["confusion"].cpu()
        support = confusion.sum(1)
        per_class = torch.where(support > 0, values["per_class"].cpu(), float("nan"))
        return {
            "top1": float(values["top1"]),
            "top5": float(values["top5"]),
            "f1": float(values["f1"]),
            "loss": float(self.loss.compute()),
            "samples": int(support.sum()),
            "per_class": per_class,
            "confusion": confusion,
        }

    def reset(self) -> None:
        self.scores.reset()
        self.loss.reset()
