"""`keep: auto`: which layers stay in full precision, chosen on calibration images within a budget.

Layers are ranked by the KL divergence that each causes alone, per byte that keeping it adds: the greedy order of a
knapsack. How many of them are needed is measured on the joint model and never added up from the single figures, which
do not add up. The same images give the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vit_efficient.errors import UserError
from vit_efficient.quantization.base import AutoKeep
from vit_efficient.quantization.mixture import Mixture
from vit_efficient.quantization.select import find_layers
from vit_efficient.quantization.sensitivity import Progress, Record, Subject, Tally, measure, split_labels

_ROUNDING = 1e-9  # points; a drop of 0.3 may come as 0.30000000000000004


@dataclass(frozen=True)
class Choice:
    """Layers to keep, and what the model comes to with them, on the images that it was chosen on.

    Args:
        keep: for the recipe: names of all layers that stay in floating point, those that were not quantized to begin
            with included, in the order of the model.
        chosen: those of them that were quantized before.
        record: the joint model, measured.
        weight_bytes: all its tensors, in a file.
        plain: the model with nothing kept besides, measured.
        plain_bytes: all tensors of that.
    """

    keep: tuple[str, ...]
    chosen: tuple[str, ...]
    record: Record
    weight_bytes: int
    plain: Record
    plain_bytes: int


def choose_keep(
    mixture: Mixture,
    batches: Sequence[Tensor],
    budget: AutoKeep,
    labels: Tensor | None = None,
    records: Sequence[Record] = (),
    progress: Progress | None = None,
) -> Choice:
    """Choose the layers to keep.

    With a limit on the drop, the shortest beginning of the ranking whose joint model keeps to it, found by bisection.
    With a limit on bytes alone, the ranking is filled in as far as it fits, and so is the ranking by KL divergence
    alone, since a large layer may be worth more than many small ones; the closer joint model is taken.

    Args:
        mixture: the float model and the quantized one, in which every layer that is to be judged is quantized.
        batches: calibration images, normalised, each (B, 3, P, P). They are gone through once for each layer and up to
            log2(layers) + 2 times more.
        budget: the limits.
        labels: classes of all images; without them a drop is one of agreement with full precision.
        records: what `measure` gave for the same mixture and images; what is there is not measured again.
        progress: see `measure`.

    Raises:
        UserError: the budget cannot be met, or needs no quantization at all; no images; see `measure`.
    """
    _fitting(mixture, mixture.names, budget)  # what cannot be met in any order is known before anything is measured
    single = {record.subject.name: record for record in records if record.subject.kind == "layer"}
    if missing := [layer for layer in mixture.layers if layer.name not in single]:
        wanted = [Subject("layer", layer.name, (layer.name,), layer.role, layer.block) for layer in missing]
        single |= {record.subject.name: record for record in measure(mixture, wanted, batches, labels, progress)}
    kl = {name: single[name].logits.kl for name in mixture.names}
    added = {name: max(1, mixture.float_bytes[name] - mixture.quantized_bytes[name]) for name in mixture.names}
    by_byte = sorted(mixture.names, key=lambda name: -kl[name] / added[name])  # stable: ties keep the model's order
    judge = _Judge(mixture, batches, labels)

    fitting = _fitting(mixture, by_byte, budget)
    if budget.drop_limit is not None:
        chosen = fitting[: _fewest(judge, fitting, budget)]
    else:
        by_kl = _fitting(mixture, sorted(mixture.names, key=lambda name: -kl[name]), budget)
        chosen = min((fitting, by_kl), key=lambda kept: judge(kept).logits.kl)
    kept = {layer.name for layer in find_layers(mixture.quantized_model) if layer.role != "other"}
    kept -= set(mixture.names) - set(chosen)
    return Choice(
        keep=_ordered(mixture, kept),
        chosen=_ordered(mixture, set(chosen)),
        record=judge(chosen),
        weight_bytes=mixture.bytes_with(chosen),
        plain=judge([]),
        plain_bytes=mixture.total_bytes,
    )


class _Judge:
    """Measures joint models; the reference once, and no model twice."""

    def __init__(self, mixture: Mixture, batches: Sequence[Tensor], labels: Tensor | None) -> None:
        self.mixture, self.batches, self.labels = mixture, batches, split_labels(batches, labels)
        self.references = [mixture.only(())(images) for images in batches]
        self.known: dict[frozenset[str], Record] = {}

    def __call__(self, kept: Sequence[str]) -> Record:
        key = frozenset(kept)
        if key not in self.known:
            rest = tuple(name for name in self.mixture.names if name not in key)
            tally = Tally(self.mixture, Subject("protect", ", ".join(kept), rest))
            for images, reference, labels in zip(self.batches, self.references, self.labels, strict=True):
                tally.run(images, reference, labels)
            self.known[key] = tally.record()
        return self.known[key]


def _fitting(mixture: Mixture, order: Sequence[str], budget: AutoKeep) -> list[str]:
    """As much of `order` as fits into the bytes, front first; at least one layer is left to quantize."""
    limit = budget.max_bytes
    if limit is None:
        return list(order[:-1])
    if mixture.total_bytes > limit:
        raise UserError(
            f"quantization.budget.max_bytes is {limit:,}, and the model weighs {mixture.total_bytes:,} bytes with "
            "every layer quantized. Raise it, or quantize to fewer bits."
        )
    chosen: list[str] = []
    for name in order:
        if mixture.bytes_with([*chosen, name]) <= limit:
            chosen.append(name)
    if len(chosen) == len(order):
        raise UserError(
            f"quantization.budget.max_bytes is {limit:,}, and the model in full precision weighs "
            f"{mixture.bytes_with(chosen):,} bytes: nothing need be quantized. Lower it, or set `quantization=none`."
        )
    return chosen


def _fewest(judge: _Judge, order: Sequence[str], budget: AutoKeep) -> int:
    """How many of `order`, from its beginning, must be kept for the joint model to lose no more than allowed."""
    limit = budget.drop_limit
    assert limit is not None

    def enough(count: int) -> bool:
        return judge(order[:count]).drop <= limit + _ROUNDING

    if enough(0):
        return 0
    if not enough(len(order)):
        within = f" within max_bytes={budget.max_bytes:,}" if budget.max_bytes else ""
        remedy = " or max_bytes" if budget.max_bytes else ""
        raise UserError(
            f"quantization.budget.max_drop={limit:g} cannot be met{within}: with {len(order)} of "
            f"{len(judge.mixture.names)} layers in full precision, {judge(order).drop:.2f} points are lost on the "
            f"calibration images; with none, {judge([]).drop:.2f}. Raise max_drop{remedy}."
        )
    low, high = 0, len(order)  # too few, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _ordered(mixture: Mixture, names: set[str]) -> tuple[str, ...]:
    return tuple(layer.name for layer in find_layers(mixture.quantized_model) if layer.name in names)
