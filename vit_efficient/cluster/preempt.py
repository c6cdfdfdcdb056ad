"""One owner of the signals that ask a run to stop.

A handler only sets a flag. The training loop reads it at the end of an optimizer step, agrees on it with all ranks
(`cluster.agreement`), so that every rank has finished the same step, saves, and leaves. (Saving inside a handler can
interrupt a half-written checkpoint or hang a collective: pytorch-lightning issue 21406.)
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from vit_efficient.cluster import early

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
WEIGHTS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # lightest first


class StopSignals:
    """Turns SIGINT (Ctrl-C), SIGTERM and SIGUSR1 into a flag; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take the signals over, and one that came before and was lost (`cluster.early`)."""
        self.received = early.take()
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def pass_on(self) -> None:
        """Give a signal that came after the flag was last read to whoever has the signals now."""
        if self.received is not None:
            number, self.received = self.received, None
            signal.raise_signal(number)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            # A direct write: printing through a live progress display inside a handler can dead-lock it.
            import os

            os.write(2, b"\nStopping after this step, to save it. Ctrl-C again stops at once, without saving.\n")

    @property
    def weight(self) -> int:
        """Of the signal that was received, 0 for none; the heaviest of all ranks' counts.

        Who cancels a job is not overruled by its time limit.
        """
        return WEIGHTS.index(self.received) + 1 if self.received is not None else 0


def signal_of(weight: int) -> signal.Signals | None:
    """The signal of this weight."""
    return WEIGHTS[weight - 1] if weight else None
