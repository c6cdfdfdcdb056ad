"""The order in which samples are read: a pure function of (shard sizes, seed, epoch, streams).

An epoch of n samples is one canonical sequence, made without ever holding n of anything:

1. the shards are permuted, and laid end to end, each with its samples permuted within;
2. the line is cut into `streams` contiguous parts of equal length (to within one);
3. position p of the epoch is row p // streams of part p % streams, so that `streams` shards are read side by side and
   neighbours in a batch come from different shards.

Global batch b is the positions [b * batch_size, (b + 1) * batch_size); the last one may be short. Ranks and
micro-batches only decide who holds which piece of that batch: sorted by part, so that one rank keeps to few shards.

Legend: n samples of the epoch, S streams, p position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.counter import Domain, hash_int, hash_words, permutation, permute_index

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Which share of every global batch is meant: piece `number` of `pieces`."""

    number: int
    pieces: int


class Plan:
    """Locates any position of any epoch.

    Args:
        counts: samples in each shard, in the manifest's order.
        seed: any integer.
        streams: parts that are read side by side.
        shuffle: False reads the shards from front to back in every epoch (evaluation); `streams` must then be 1.
    """

    def __init__(self, counts: Sequence[int] | Ints, *, seed: int = 0, streams: int = 1, shuffle: bool = True) -> None:
        self.counts = np.asarray(counts, np.int64)
        if self.counts.size and self.counts.min() < 0:
            raise ValueError("a shard cannot hold fewer than 0 samples")
        if streams < 1 or (streams > 1 and not shuffle):
            raise ValueError("streams must be at least 1, and exactly 1 where nothing is shuffled")
        self.seed, self.streams, self.shuffle = seed, streams, shuffle
        self.samples = int(self.counts.sum())
        self._first = np.concatenate([[0], np.cumsum(self.counts)])  # global id of each shard's first sample
        self._epoch: tuple[int, Ints, Ints] | None = None

    def shard_order(self, epoch: int) -> tuple[Ints, Ints]:
        """Shards in the order of this epoch, and how many samples lie before each of them."""
        if self._epoch is None or self._epoch[0] != epoch:
            size = self.counts.size
            order = permutation(size, Domain.SHARD_ORDER, self.seed, epoch) if self.shuffle else np.arange(size)
            before = np.concatenate([[0], np.cumsum(self.counts[order])[:-1]]) if size else np.zeros(0, np.int64)
            self._epoch = (epoch, order, before)
        return self._epoch[1], self._epoch[2]

    def locate(self, epoch: int, positions: Ints) -> tuple[Ints, Ints]:
        """Shard number and index within the shard, for each position in [0, n)."""
        positions = np.asarray(positions, np.int64)
        order, before = self.shard_order(epoch)
        part, row = positions % self.streams, positions // self.streams
        length, longer = divmod(self.samples, self.streams)  # the first `longer` parts hold one sample more
        place = part * length + np.minimum(part, longer) + row
        rank = np.searchsorted(before, place, side="right") - 1  # empty shards share their `before`: the last one wins
        shard, index = order[rank], place - before[rank]
        if self.shuffle:
            key = hash_words(hash_int(Domain.SAMPLE_ORDER, self.seed, epoch), shard)
            index = permute_index(index, self.counts[shard], key)
        return shard, index

    def global_id(self, shard: Ints, index: Ints) -> Ints:
        """A number for each sample that depends on the manifest only."""
        return self._first[shard] + index

    def steps(self, batch_size: int) -> int:
        """Global batches of an epoch, the short last one included."""
        return -(-self.samples // batch_size)

    def piece(self, step: int, batch_size: int, piece: Piece) -> Ints:
        """Positions that one piece of global batch `step` holds; empty where a short batch has too few for all.

        The batch sorted by (p % S, p) is cut into pieces whose sizes differ by at most one. Closed form: costs O(S)
        plus the piece, whatever the batch.
        """
        low = step * batch_size
        size = max(0, min(batch_size, self.samples - low))
        length, longer = divmod(size, piece.pieces)
        start = piece.number * length + min(piece.number, longer)
        ordinal = np.arange(start, start + length + (piece.number < longer))

        rows, extra = divmod(size, self.streams)  # each part holds `rows` of the batch, `extra` of them one more
        first = (np.arange(self.streams) - low) % self.streams  # each part's first position, relative to `low`
        held = np.cumsum(rows + (first < extra))
        part = np.searchsorted(held, ordinal, side="right")
        within = ordinal - np.where(part > 0, held[part - 1], 0)
        return low + first[part] + within * self.streams


def accumulation(batch_size: int, world: int, micro_batch: int | None) -> int:
    """Micro-batches that each rank runs for one optimizer step.

    Args:
        batch_size: images of one optimizer step over all ranks.
        world: ranks.
        micro_batch: images that one rank holds at once; None: all of its share.

    Raises:
        ValueError: the three do not divide.
    """
    if batch_size % world:
        raise ValueError(f"batch_size {batch_size} cannot be shared evenly by {world} devices")
    share = batch_size // world
    micro_batch = share if micro_batch is None else micro_batch
    if micro_batch < 1 or share % micro_batch:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        below = max((size for size in fitting if size <= micro_batch), default=1)
        raise ValueError(
            f"micro_batch {micro_batch} does not divide the {share} images that each of {world} devices has of "
            f"batch_size {batch_size}; the nearest below that does is {below}"
        )
    return share // micro_batch
