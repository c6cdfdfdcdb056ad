"""What a signal to stop does while nothing is being trained: before the first step, and after the last.

There is nothing to save then, so the process ends at once, with a word and the signal's exit code. Left to itself it
would die of SIGUSR1 in silence, and a job would not know that it may be queued again.

The handler raises. Python drops what is raised in a finaliser or a callback of a weak reference, which every import
has, and an importer may catch it: so the signal is remembered, and raised again until somebody acts on it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN = 75.0  # seconds; more than a process may take that fails and tells the others why (`engine.guard`)
OWNED = (signal.SIGTERM, signal.SIGUSR1)

_asked: signal.Signals | None = None
_alarms: list[Any] = []  # whose they were before


class StoppedOutside(BaseException):
    """Asked to stop where there is nothing to save. Not an error, and not for `except Exception` in some library."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


def _raise(number: int, _: FrameType | None) -> None:
    global _asked
    if number != signal.SIGALRM:
        _asked = signal.Signals(number)
        previous = signal.signal(signal.SIGALRM, _raise)
        if previous is not None and previous is not _raise:  # None: not Python's, and cannot be given back
            _alarms.append(previous)
    if _asked is not None:
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise StoppedOutside(_asked)


def take() -> signal.Signals | None:
    """A signal that was raised and lost, for whoever acts on it from now on; it is not raised again."""
    global _asked
    asked, _asked = _asked, None
    if asked is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if _alarms:
        signal.signal(signal.SIGALRM, _alarms.pop())
    return asked


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 raise `StoppedOutside`; training takes them over for its time.

    So does any error after one, which may be its doing: a module half imported, a process of a pool that it ended.
    Ctrl-C raises `KeyboardInterrupt`, as ever. After a signal the process's timer (`ITIMER_REAL`) is this module's.
    """
    before = {number: signal.getsignal(number) for number in OWNED}
    try:
        for number in OWNED:
            signal.signal(number, _raise)
        yield
    except Exception as error:
        if (asked := take()) is not None:
            raise StoppedOutside(asked) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        take()
