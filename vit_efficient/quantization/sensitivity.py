"""Which layers suffer from quantization: one layer, one role, one block at a time, and what protecting some buys.

The method is that of Wu et al. 2020 (arXiv:2004.09602, section 6.1): quantize one part, leave the rest in full
precision, compare the outputs. Parts do not add up to the whole, so the whole model is measured too, and the whole
model but for one part. Legend: B images, C classes, P pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from vit_efficient.errors import UserError
from vit_efficient.quantization.agreement import Comparer, LogitComparison, correct
from vit_efficient.quantization.mixture import Mixed, Mixture, Trace

# `float`: full precision itself. `layer`, `role`, `block`: only that is quantized. `all`: the quantized model. `rest`:
# what is quantized outside its layers, that is its attention. `protect`: the quantized model, but for that.
Kind = Literal["float", "all", "rest", "layer", "role", "block", "protect"]
Progress = Callable[[int, int], None]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Subject:
    """A mixture of the float and the quantized model.

    Args:
        kind: see `Kind`.
        name: the layer, role or block (``blocks.3``); of `protect`, what is protected, in the words of `keep`.
        layers: the layers that are quantized.
        role: that of a single layer.
        block: that of a single layer or block.
    """

    kind: Kind
    name: str
    layers: tuple[str, ...]
    role: str | None = None
    block: int | None = None


@dataclass(frozen=True)
class Record:
    """What a mixture came to.

    Args:
        subject: which one.
        weight_bytes: its quantized layers as they are stored.
        float_bytes: the same layers in floating point.
        logits: its logits against those of full precision.
        top1: share of the images classified correctly, of 1; None without labels.
        lost: images that full precision gets right and the mixture does not; None without labels.
        gained: the reverse.
    """

    subject: Subject
    weight_bytes: int
    float_bytes: int
    logits: LogitComparison
    top1: float | None = None
    lost: int | None = None
    gained: int | None = None

    @property
    def drop(self) -> float:
        """Points of top-1 lost against full precision; without labels, points of agreement."""
        if self.lost is None or self.gained is None:
            return 100 * (1 - self.logits.agreement)
        return 100 * (self.lost - self.gained) / self.logits.n


def subjects(mixture: Mixture) -> list[Subject]:
    """Everything worth measuring, in the order of a report.

    Protected are the first block, the last one, both, and each role; not what would leave nothing quantized.
    """
    layers, names = mixture.layers, mixture.names
    roles = _grouped((layer.role, layer.name) for layer in layers)
    blocks = _grouped((layer.block, layer.name) for layer in layers if layer.block is not None)
    found = [Subject("float", "full precision", ()), Subject("all", "everything", names)]
    if mixture.differs_elsewhere:
        found.append(Subject("rest", "attention", ()))
    found += [Subject("layer", layer.name, (layer.name,), layer.role, layer.block) for layer in layers]
    found += [Subject("role", role, inside) for role, inside in roles.items()]
    found += [Subject("block", f"blocks.{number}", inside, block=number) for number, inside in blocks.items()]
    for name, protected in [*_ends(blocks), *roles.items()]:
        if rest := tuple(layer for layer in names if layer not in protected):
            found.append(Subject("protect", name, rest))
    return found


def added_bytes(everything: Record, protected: Record) -> int:
    """What a model weighs more for protecting some layers."""
    return (everything.float_bytes - everything.weight_bytes) - (protected.float_bytes - protected.weight_bytes)


def measure(
    mixture: Mixture,
    chosen: Sequence[Subject],
    batches: Sequence[Tensor],
    labels: Tensor | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Measure mixtures on the same images. Modules are swapped in and back; both models end as they began.

    Runs in the precision of its surroundings: call it under the autocast of the run. For a batch, the outputs of all
    blocks of the float model are held, so that a layer in block 7 costs no run of blocks 0 to 6.

    Args:
        mixture: the float model and the quantized one.
        chosen: for example `subjects(mixture)`.
        batches: normalised images, each (B, 3, P, P).
        labels: classes of all images, in their order; None if they are not known.
        progress: is told (runs done, runs in all) after each; a run is one mixture on one batch.

    Returns:
        A record for each subject, in their order.

    Raises:
        UserError: no images, labels of another number, or the float model itself gives NaN or infinite logits.
    """
    tallies = [Tally(mixture, subject) for subject in chosen]
    done, total = 0, len(batches) * len(tallies)
    for images, known in zip(batches, split_labels(batches, labels), strict=True):
        trace = Trace()
        with trace.of(mixture.float_model):
            reference = mixture.only(())(images)
        for tally in tallies:
            tally.run(images, reference, known, trace)
            done += 1
            if progress is not None:
                progress(done, total)
    return [tally.record() for tally in tallies]


def split_labels(batches: Sequence[Tensor], labels: Tensor | None) -> list[Tensor | None]:
    """The labels of each batch.

    Raises:
        UserError: no images, or labels of another number.
    """
    sizes = [len(images) for images in batches]
    if sum(sizes) == 0:
        raise UserError("There are no images to measure on. Give calibration images (`data.shards`).")
    if labels is None:
        return [None] * len(batches)
    if len(labels) != sum(sizes):
        raise UserError(f"There are {len(labels):,} labels for {sum(sizes):,} images. Give one an image, or none.")
    return list(labels.split(sizes))


class Tally:
    """One mixture, counted batch by batch."""

    def __init__(self, mixture: Mixture, subject: Subject) -> None:
        self.subject, self.comparer = subject, Comparer()
        self.is_float = subject.kind == "float"
        self.on_float = subject.kind not in ("all", "rest", "protect")
        rest = tuple(name for name in mixture.names if name not in subject.layers)
        # What is quantized outside the layers belongs to the quantized model and to none of them.
        self.mixed: Mixed = mixture.only(subject.layers) if self.on_float else mixture.without(rest)
        self.weight_bytes = sum(mixture.quantized_bytes[name] for name in subject.layers)
        self.float_bytes = sum(mixture.float_bytes[name] for name in subject.layers)
        self.labelled = False
        self.right = self.lost = self.gained = 0

    def run(self, images: Tensor, reference: Tensor, labels: Tensor | None, trace: Trace | None = None) -> None:
        """Count a batch: images (B, 3, P, P), the float model's logits (B, C) and blocks for them, labels (B,)."""
        logits = reference if self.is_float else self.mixed(images, trace if self.on_float else None)
        self.comparer.update(reference, logits)
        if labels is None:
            return
        self.labelled = True
        before, after = correct(labels, reference), correct(labels, logits)
        self.right += int(after.sum())
        self.lost += int((before & ~after).sum())
        self.gained += int((after & ~before).sum())

    def record(self) -> Record:
        """The figures so far."""
        logits = self.comparer.result()
        counts = (self.right / logits.n, self.lost, self.gained) if self.labelled else (None, None, None)
        return Record(self.subject, self.weight_bytes, self.float_bytes, logits, *counts)


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, tuple[str, ...]]:
    groups: dict[Key, tuple[str, ...]] = {}
    for key, name in pairs:
        groups[key] = (*groups.get(key, ()), name)
    return groups


def _ends(blocks: dict[int, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    if not blocks:
        return
    first, last = min(blocks), max(blocks)
    yield "first_block", blocks[first]
    if first != last:
        yield "last_block", blocks[last]
        yield "first_block, last_block", blocks[first] + blocks[last]
