"""A signal outside training ends what is under way, wherever it comes."""

from __future__ import annotations

import os
import signal
import time
import weakref

import pytest

from vit_efficient.cluster import early
from vit_efficient.cluster.early import StoppedOutside, stop_at_once
from vit_efficient.cluster.preempt import StopSignals
from vit_efficient.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
OWNED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def drop(number: int) -> None:
    """Send a signal where what its handler raises gets lost."""

    class Thing:
        pass

    thing = Thing()
    alive = weakref.ref(thing, lambda _: kill(number))
    del thing
    assert alive() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_it_is_raised(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in OWNED]
    with pytest.raises(StoppedOutside) as stopped, stop_at_once():
        kill(number)
    assert stopped.value.signal == number
    assert [signal.getsignal(one) for one in OWNED] == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_raised_again_where_it_was_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "AGAIN", 0.2)
    began = time.monotonic()
    with pytest.raises(StoppedOutside) as stopped, stop_at_once():  # noqa: PT012
        drop(signal.SIGUSR1)
        time.sleep(60)
    assert time.monotonic() - began < 30
    assert stopped.value.signal == signal.SIGUSR1


def test_what_is_done_before_it_is_raised_again_is_done() -> None:
    with stop_at_once():
        drop(signal.SIGTERM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with stop_at_once():
        assert early.take() is None


def test_an_error_after_it_is_its_doing() -> None:
    with pytest.raises(StoppedOutside) as stopped, stop_at_once():  # noqa: PT012
        drop(signal.SIGTERM)
        raise DataError("One of the 2 processes that share the work was killed")
    assert isinstance(stopped.value.__cause__, DataError)
    with pytest.raises(DataError), stop_at_once():
        raise DataError("one without a signal is one")


def test_training_takes_it_up() -> None:
    stop = StopSignals()
    with stop_at_once():
        drop(signal.SIGUSR1)
        stop.install()
        assert stop.received == signal.SIGUSR1
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        stop.restore()


def test_training_passes_on_what_came_too_late() -> None:
    stop = StopSignals()
    with pytest.raises(StoppedOutside) as stopped, stop_at_once():  # noqa: PT012
        stop.install()
        kill(signal.SIGTERM)
        stop.restore()
        stop.pass_on()
    assert stopped.value.signal == signal.SIGTERM
