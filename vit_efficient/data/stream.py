"""Micro-batches over a plan: what the processes of a data loader run.

Worker w of n takes the micro-batches w, w + n, ...; the loader asks its workers in turn, so that they come back in
order for any number of workers. Where a micro-batch starts is looked up, never read up to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vit_efficient.data.counter import Domain, hash_words
from vit_efficient.data.decode import UndecodableImage
from vit_efficient.data.deferred import Deferred, DeferredImages
from vit_efficient.data.plan import Piece, Plan
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.samples import BadSample, Sample
from vit_efficient.data.transforms import Pixels, Transform
from vit_efficient.errors import DataError

Batch = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a global batch is shared: `world` ranks, each running `accumulate` micro-batches one after the other."""

    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def piece(self, micro: int) -> Piece:
        """This rank's micro-batch number `micro` of every step."""
        return Piece(self.rank * self.accumulate + micro, self.world * self.accumulate)


@dataclass(frozen=True)
class Failure:
    """An error on its way out of a worker; the loader raises it, without the worker's traceback."""

    message: str


class SampleStream(IterableDataset[Batch | Failure]):
    """Micro-batches of one rank, from a given step on.

    Args:
        reader: random access to the samples.
        plan: their order.
        transform: what makes pixels of them.
        layout: which share of every global batch is this rank's.
        seed: of the augmentation.
        start: global step to begin with.
        stop: global step to end before; None: on and on, epoch after epoch.
        skip_bad: leave undecodable or altered samples out (weight 0) instead of stopping.
    """

    def __init__(
        self,
        reader: ShardReader,
        plan: Plan,
        transform: Transform,
        layout: Layout,
        *,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        super().__init__()
        self.reader, self.plan, self.transform, self.layout = reader, plan, transform, layout
        self.seed, self.start, self.stop, self.skip_bad = seed, start, stop, skip_bad
        self.steps_per_epoch = plan.steps(layout.batch_size)

    def __iter__(self) -> Iterator[Batch | Failure]:
        info = get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        try:
            for number in itertools.count(first, stride):
                step, micro = divmod(number, self.layout.accumulate)
                if self.stop is not None and self.start + step >= self.stop:
                    return
                yield self.micro_batch(self.start + step, micro)
        except DataError as error:
            yield Failure(str(error))

    def micro_batch(self, step: int, micro: int) -> Batch:
        """One micro-batch of this rank.

        Args:
            step: global optimizer step, counted over all epochs.
            micro: number within the step.

        Returns:
            `image` uint8 (b, 3, S, S), channels last in memory; `label` int64 (b,); `weight` float32 (b,), 0 for what
            must not count; `deferred` images that the device decodes into their rows of `image` (if that is all rows,
            `image` is empty);
            `position` int64 (b,) in the epoch, -1 for a filler; `key` list of b strings; `erase` int64 (b, 4), if the
            transform erases; `count` samples of the whole global batch; `step`; `epoch`; `micro` number of this
            micro-batch among those of all ranks; `skipped` list of what was left out, and why.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        piece = self.layout.piece(micro)
        positions = self.plan.piece(within, self.layout.batch_size, piece)
        low = within * self.layout.batch_size
        batch = self._read(epoch, positions) if positions.size else self._filler()
        batch["count"] = min(self.layout.batch_size, self.plan.samples - low)
        return batch | {"step": step, "epoch": epoch, "micro": piece.number}

    def _read(self, epoch: int, positions: np.ndarray) -> Batch:
        shards, indices = self.plan.locate(epoch, positions)
        seeds = hash_words(Domain.AUGMENT, self.seed, epoch, self.plan.global_id(shards, indices))
        batch = self._empty(positions.size)
        batch["position"] = torch.from_numpy(positions)
        pixels = _new_pixels(positions.size, self.transform.size)
        rows = pixels.numpy()  # the same memory; decoders give arrays that torch warns of as read-only
        deferred = DeferredImages()
        places = shards.tolist(), indices.tolist()
        samples = zip(self.reader.read_all(*places), places[0], seeds.tolist(), strict=True)
        for row, (read, shard, seed) in enumerate(samples):
            try:
                key, label, made = self._sample(read, shard, seed)
            except BadSample as error:
                if not self.skip_bad:
                    raise
                batch["skipped"].append(str(error))
                continue
            if isinstance(made.image, Deferred):
                deferred.add(row, made.image)
            else:
                np.copyto(rows[row], made.image)
            batch["label"][row], batch["weight"][row], batch["key"][row] = label, 1.0, key
            if self.transform.erases:
                batch["erase"][row] = torch.tensor(made.erase)
        if deferred.rows:
            batch["deferred"] = deferred
            if len(deferred.rows) == positions.size:
                pixels = pixels[:0]
        batch["image"] = pixels.permute(0, 3, 1, 2)  # a view: the device puts channels first
        return batch

    def _sample(self, read: Callable[[], Sample], shard: int, seed: int) -> tuple[str, int, Pixels]:
        sample = read()
        try:
            return sample.key, sample.label, self.transform(sample.image, seed)
        except UndecodableImage as error:
            raise BadSample(
                f"{self.reader.shards.name(shard)}, sample {sample.key}: the image cannot be decoded: {error}. "
                "Leave such images out with data.on_error=skip."
            ) from error

    def _empty(self, size: int) -> Batch:
        """Nothing but weight 0."""
        batch: Batch = {
            "label": torch.zeros(size, dtype=torch.int64),
            "weight": torch.zeros(size, dtype=torch.float32),
            "position": torch.full((size,), -1, dtype=torch.int64),
            "key": [""] * size,
            "skipped": [],
        }
        if self.transform.erases:
            batch["erase"] = torch.zeros(size, 4, dtype=torch.int64)
        return batch

    def _filler(self) -> Batch:
        """What a rank without samples runs, so that it takes part in the step's collectives."""
        image = torch.zeros(1, self.transform.size, self.transform.size, 3, dtype=torch.uint8)
        return self._empty(1) | {"image": image.permute(0, 3, 1, 2)}


def _new_pixels(count: int, size: int) -> Tensor:
    """Zeros, uint8 (count, size, size, 3); in a worker at once where the main process can see them, as torch's own
    collation does, so that a batch is not copied once more on its way."""
    shape = (count, size, size, 3)
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # fresh pages, and so zeros
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
