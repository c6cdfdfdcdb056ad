"""Images made by other processes are those that one alone would make, in the same order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from vit_efficient.data.encode import Recode
from vit_efficient.data.pool import Work, make_all
from vit_efficient.data.sources.base import BadImage, RawImage, Subset
from vit_efficient.data.sources.digits import Digits
from vit_efficient.errors import DataError

WORK = Work(Subset(Digits(), np.arange(700)), 5, Recode())


def test_the_order_is_a_permutation() -> None:
    made = list(make_all(WORK, 0, 1))
    assert sorted(one.index for one in made) == list(range(700))
    assert [one.index for one in made] != list(range(700))
    assert all(one.label == WORK.split.labels[one.index] for one in made)


@pytest.mark.parametrize("start", [0, 333])
def test_several_processes_make_the_same(start: int) -> None:
    alone = list(make_all(WORK, 0, 1))[start:]
    feed = make_all(WORK, start, 2)
    first = next(feed)
    assert len(multiprocessing.active_children()) == 2
    assert [first, *feed] == alone
    assert not multiprocessing.active_children()


def test_a_feed_that_is_not_needed_any_more_ends_its_processes() -> None:
    feed = make_all(WORK, 0, 2)
    next(feed)
    feed.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_small_set_is_done_before_others_would_have_started() -> None:
    for one in make_all(WORK, 0, 2, patience=60.0):
        assert one.index >= 0
        assert not multiprocessing.active_children()


def test_when_it_takes_long_the_others_are_started() -> None:
    alone = list(make_all(WORK, 0, 1))
    made, started = [], 0
    for number, one in enumerate(make_all(WORK, 0, 2, patience=0.1)):
        made.append(one)
        if number < 32:
            time.sleep(0.01)  # a slow disk
        started = started or (number if multiprocessing.active_children() else 0)
    assert made == alone
    assert 8 <= started < 100


def test_a_process_that_is_killed_is_an_error() -> None:
    feed = make_all(WORK, 0, 2)
    next(feed)
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(DataError, match=r"One of the 2 processes.* was killed.* fewer --processes"):
        list(feed)
    assert not multiprocessing.active_children()


class OneBad(Digits):
    def read(self, index: int) -> RawImage:
        if index == 3:
            raise BadImage("no bytes")
        return super().read(index)


def test_a_bad_image_has_its_reason() -> None:
    made = {one.index: one for one in make_all(Work(Subset(OneBad(), np.arange(10)), 5, Recode()), 0, 1)}
    assert (made[3].data, made[3].reason) == (b"", "no bytes")
    assert all(made[index].reason is None for index in range(10) if index != 3)
