"""What a signal to stop does while nothing is being trained: before the first step, and after the last.

There is nothing to save then, so the process ends at once, with a word and the signal's exit code. Left to itself it
would die of SIGUSR1 in silence, and a job would not know that it may be queued again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StoppedOutside(BaseException):
    """Asked to stop where there is nothing to save. Not an error, and not for `except Exception` in some library."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


def _raise(number: int, _: FrameType | None) -> None:
    raise StoppedOutside(number)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise `StoppedOutside`; training takes them over for its time.

    Ctrl-C raises `KeyboardInterrupt`, as ever.
    """
    before = {number: signal.signal(number, _raise) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
