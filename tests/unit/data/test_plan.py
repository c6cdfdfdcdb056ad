from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_efficient.data.plan import Piece, Plan, accumulation

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
streams = st.integers(1, 30)
seeds = st.integers(0, 2**70)


def ids(plan: Plan, epoch: int) -> list[int]:
    return plan.global_id(*plan.locate(epoch, np.arange(plan.samples))).tolist()


@given(counts, seeds, st.integers(0, 10**6), streams)
def test_an_epoch_has_every_sample_once(counts: list[int], seed: int, epoch: int, streams: int) -> None:
    plan = Plan(counts, seed=seed, streams=streams)
    shard, index = plan.locate(epoch, np.arange(plan.samples))
    assert (index >= 0).all()
    assert (index < plan.counts[shard]).all()
    assert sorted(ids(plan, epoch)) == list(range(sum(counts)))


@given(counts, seeds, streams, st.integers(1, 50), st.integers(1, 9), st.integers(1, 4))
def test_ranks_and_micro_batches_share_every_batch_evenly(
    counts: list[int], seed: int, streams: int, batch: int, world: int, accumulate: int
) -> None:
    plan = Plan(counts, seed=seed, streams=streams)
    pieces = world * accumulate
    for step in range(plan.steps(batch)):
        parts = [plan.piece(step, batch, Piece(number, pieces)) for number in range(pieces)]
        sizes = [part.size for part in parts]
        assert max(sizes) - min(sizes) <= 1
        joined = np.concatenate(parts).tolist()
        assert sorted(joined) == list(range(step * batch, min((step + 1) * batch, plan.samples)))
        assert joined == sorted(joined, key=lambda p: (p % streams, p))  # rank by rank, few shards each


@given(st.lists(st.integers(1, 40), min_size=2, max_size=12), seeds, streams)
def test_order_is_new_each_epoch_and_the_same_for_a_seed(counts: list[int], seed: int, streams: int) -> None:
    first, again = (Plan(counts, seed=seed, streams=streams) for _ in range(2))
    orders = [ids(first, epoch) for epoch in range(3)]
    assert ids(again, 1) == orders[1]  # without having seen epoch 0
    if sum(counts) > 20:
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert ids(Plan(counts, seed=seed + 1, streams=streams), 0) != orders[0]


@given(counts, seeds, streams)
def test_any_position_is_found_alone(counts: list[int], seed: int, streams: int) -> None:
    plan = Plan(counts, seed=seed, streams=streams)
    whole = ids(plan, 3)
    for position in {0, plan.samples // 2, plan.samples - 1}:
        fresh = Plan(counts, seed=seed, streams=streams)
        assert fresh.global_id(*fresh.locate(3, np.array([position])))[0] == whole[position]


def test_evaluation_reads_front_to_back() -> None:
    plan = Plan([3, 0, 4], shuffle=False)
    shard, index = plan.locate(5, np.arange(7))
    assert shard.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert index.tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_streams_are_read_side_by_side() -> None:
    """Consecutive positions lie in as many shards as there are streams, so a batch mixes shards."""
    plan = Plan([100] * 16, seed=1, streams=16)
    shard, _ = plan.locate(0, np.arange(160))
    assert all(len(set(shard[low : low + 16].tolist())) == 16 for low in range(0, 160, 16))


def test_samples_travel_far_and_classes_mix() -> None:
    """Shuffle quality: the mean displacement of a uniform shuffle is n/3; batches are as mixed as drawn ones."""
    n, batch = 8_000, 100
    plan = Plan([500] * 16, seed=0, streams=64)
    order = np.asarray(ids(plan, 0))
    displacement = np.abs(order - np.arange(n)).mean() / n
    assert displacement == pytest.approx(1 / 3, abs=0.05)
    classes = (order * 10 // n).reshape(-1, batch)  # the source sorted by class, which preparation avoids
    spread = np.array([np.bincount(row, minlength=10).std() for row in classes]).mean()
    assert spread < 2 * np.sqrt(batch * 0.1 * 0.9)


@settings(deadline=None)
@given(st.integers(0, 10**5))
def test_holds_at_a_billion_samples(epoch: int) -> None:
    plan = BILLION
    batch, world = 65_536, 1024
    step = plan.steps(batch) - 2
    positions = plan.piece(step, batch, Piece(1000, world))
    shard, index = plan.locate(epoch % 2, positions)
    assert positions.size == 64
    assert (index < plan.counts[shard]).all()


BILLION = Plan(np.full(100_000, 10_000), seed=1, streams=64)


def test_a_billion_samples_cost_little() -> None:
    tracemalloc.start()
    began = time.perf_counter()
    plan = Plan(np.full(100_000, 10_000), seed=1, streams=64)
    plan.locate(0, np.arange(64))
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 5
    assert peak < 50e6


def test_plan_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="streams"):
        Plan([3], streams=0)
    with pytest.raises(ValueError, match="streams"):
        Plan([3], streams=2, shuffle=False)
    with pytest.raises(ValueError, match="fewer than 0"):
        Plan([3, -1])


def test_accumulation() -> None:
    assert accumulation(1024, 8, 32) == 4
    assert accumulation(1024, 8, None) == 1
    with pytest.raises(ValueError, match="shared evenly by 3"):
        accumulation(64, 3, None)
    with pytest.raises(ValueError, match="nearest below that does is 16"):
        accumulation(64, 2, 20)
    with pytest.raises(ValueError, match="does not divide"):
        accumulation(64, 2, 0)
