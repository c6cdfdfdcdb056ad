"""Figures counted by hand."""

from __future__ import annotations

import math

import torch

from vit_efficient.model.metrics import ClassificationMetrics


def logits_for(predicted: list[int], classes: int) -> torch.Tensor:
    return 5 * torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()


def test_counts_by_hand() -> None:
    metrics = ClassificationMetrics(3)
    metrics.update(logits_for([0, 1, 1, 2], 3), torch.tensor([0, 0, 1, 2]), torch.ones(4))
    figures = metrics.compute()
    assert figures["top1"] == 0.75
    assert figures["top5"] == 1.0
    assert figures["samples"] == 4
    assert figures["confusion"].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert figures["per_class"].tolist() == [0.5, 1.0, 1.0]
    assert math.isclose(figures["f1"], (2 / 3 + 2 / 3 + 1) / 3, rel_tol=1e-6)


def test_fillers_do_not_count() -> None:
    full, padded = ClassificationMetrics(3), ClassificationMetrics(3)
    full.update(logits_for([0, 1], 3), torch.tensor([0, 2]), torch.ones(2))
    padded.update(logits_for([0, 1, 2, 2], 3), torch.tensor([0, 2, 2, 2]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    padded.update(logits_for([1], 3), torch.tensor([1]), torch.zeros(1))
    a, b = full.compute(), padded.compute()
    assert (a["top1"], a["loss"], a["samples"]) == (b["top1"], b["loss"], b["samples"])


def test_a_class_without_samples_has_no_accuracy() -> None:
    metrics = ClassificationMetrics(3)
    metrics.update(logits_for([0, 0], 3), torch.tensor([0, 1]), torch.ones(2))
    assert [math.isnan(v) for v in metrics.compute()["per_class"].tolist()] == [False, False, True]


def test_top5_of_many_classes() -> None:
    metrics = ClassificationMetrics(10)
    logits = torch.arange(10, 0, -1).float().repeat(2, 1)  # class 0 first, class 4 fifth
    metrics.update(logits, torch.tensor([4, 5]), torch.ones(2))
    figures = metrics.compute()
    assert (figures["top1"], figures["top5"]) == (0.0, 0.5)
