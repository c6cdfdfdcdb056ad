"""Signals become a flag; handlers are given back."""

from __future__ import annotations

import os
import signal

import pytest

from vit_efficient.cluster.preempt import StopSignals, signal_of


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopSignals()
    stop.install()
    try:
        assert signal_of(stop.weight) is None
        os.kill(os.getpid(), number)
        assert signal_of(stop.weight) == stop.received == number
    finally:
        stop.restore()
    assert signal.getsignal(number) is before


def test_second_interrupt_is_immediate() -> None:
    stop = StopSignals()
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()
