"""What the sample plan costs at sizes that no disk here holds, and how well it shuffles."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.manifest import Manifest, ShardEntry, read_manifest
from vit_efficient.data.plan import Piece, Plan


@dataclass(frozen=True)
class PlanCost:
    """One rank's plan.

    Args:
        samples: of the epoch.
        shards: that they lie in.
        seconds: to read the manifest, make the plan and locate a first micro-batch.
        peak_bytes: allocated at most on the way.
        seek_seconds: median of going to a random step of a random epoch that is at hand, and locating a micro-batch.
        epoch_seconds: of the same, where the epoch is a new one and its shards must be permuted.
    """

    samples: int
    shards: int
    seconds: float
    peak_bytes: int
    seek_seconds: float
    epoch_seconds: float


def plan_cost(
    shards: int = 100_000, samples: int = 10**9, *, world: int = 1024, workers: int = 8, batch_size: int = 65_536
) -> PlanCost:
    """Time one worker's share: rank `world` - 1, which runs `workers` micro-batches of every step."""
    counts = np.full(shards, samples // shards, np.int64)
    counts[: samples % shards] += 1
    piece = Piece(world * workers - 1, world * workers)

    def locate(plan: Plan, epoch: int, step: int) -> None:
        plan.locate(epoch, plan.piece(step, batch_size, piece))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _manifest(counts).write(folder)
        began = time.perf_counter()
        plan = Plan([entry.samples for entry in read_manifest(folder).shards], seed=1, streams=64)
        locate(plan, 0, 0)
        seconds = time.perf_counter() - began

        tracemalloc.start()  # a second time, for it slows all that it watches
        again = Plan([entry.samples for entry in read_manifest(folder).shards], seed=1, streams=64)
        locate(again, 0, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

    rng = np.random.default_rng(0)
    seeks, epochs = [], []
    for step in rng.integers(0, plan.steps(batch_size), 50).tolist():
        began = time.perf_counter()
        locate(plan, 0, step)
        seeks.append(time.perf_counter() - began)
    for epoch, step in enumerate(rng.integers(0, plan.steps(batch_size), 10).tolist(), 1):
        began = time.perf_counter()
        locate(plan, epoch, step)
        epochs.append(time.perf_counter() - began)
    return PlanCost(samples, shards, seconds, peak, float(np.median(seeks)), float(np.median(epochs)))


def _manifest(counts: NDArray[np.int64]) -> Manifest:
    """Of shards that are not there."""
    shards = tuple(
        ShardEntry(file=f"train-{number:06d}.tar", samples=count, bytes=110_000 * count, sha256=f"{number:064x}")
        for number, count in enumerate(counts.tolist())
    )
    names = tuple(f"n{number:08d}" for number in range(1000))
    each = tuple([int(counts.sum()) // 1000] * 1000)
    return Manifest(source="none", options={}, split="train", class_names=names, class_counts=each, shards=shards)


@dataclass(frozen=True)
class Shuffle:
    """How far an epoch's order is from a perfect shuffle, in which all shares are 1.

    Args:
        displacement: mean distance between a sample's place in the shards and its place in the epoch, over the one
            that a perfect shuffle has (a third of the epoch).
        between_epochs: the same between its places in two epochs.
        classes: different classes in a batch, over the number that a perfect shuffle has on average.
        worst_batch: the same of the batch with the fewest, over the fewest of a perfect shuffle.
    """

    displacement: float
    between_epochs: float
    classes: float
    worst_batch: float


def shuffle_quality(
    labels: NDArray[np.integer], shard_samples: int, *, streams: int = 64, batch_size: int = 1024, seed: int = 0
) -> Shuffle:
    """Measure a plan over samples whose labels lie in the shards in this order.

    Args:
        labels: by place in the shards.
        shard_samples: samples of a shard.
        streams: of the plan.
        batch_size: global.
        seed: of the plan.
    """
    size = labels.size
    counts = np.full(-(-size // shard_samples), shard_samples, np.int64)
    counts[-1] = size - shard_samples * (counts.size - 1)
    plan = Plan(counts, seed=seed, streams=streams)
    first, second = (plan.global_id(*plan.locate(epoch, np.arange(size))) for epoch in (0, 1))
    perfect = np.random.default_rng(seed).permutation(size)
    where = np.empty((2, size), np.int64)
    where[0, first], where[1, second] = np.arange(size), np.arange(size)
    mixed, ideal = (_classes(labels[order], batch_size) for order in (first, perfect))
    third = (size * size - 1) / (3 * size)
    return Shuffle(
        displacement=float(np.abs(where[0] - np.arange(size)).mean() / third),
        between_epochs=float(np.abs(where[0] - where[1]).mean() / third),
        classes=float(mixed.mean() / ideal.mean()),
        worst_batch=float(mixed.min() / ideal.min()),
    )


def _classes(labels: NDArray[np.integer], batch_size: int) -> NDArray[np.int64]:
    """Different labels in each full batch."""
    whole = labels[: labels.size // batch_size * batch_size].reshape(-1, batch_size)
    ordered = np.sort(whole, axis=1)
    return 1 + (np.diff(ordered, axis=1) > 0).sum(1)
