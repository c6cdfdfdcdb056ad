"""Worker processes leave signals to the main process, which then saves and ends them.

Ctrl-C goes to a whole terminal, and Slurm's signals to all processes of a step. A worker that died of one would make
the main process fail while it saves.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def signals_held() -> Iterator[None]:
    """What this thread starts within the block is born deaf to the signals that stop a run.

    They are not lost: another thread of the process takes them for it, or they wait until the block ends.

    Of a data loader's workers, `init_worker` alone would come too late: before it, torch gives them a handler that
    ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # which may itself raise for one that has just come
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(_: int) -> None:
    """What a data loader's worker does first, forked under `signals_held`: from now on it obeys its parent alone."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # which the thread waits for
    threading.Thread(target=_obey_the_parent, daemon=True).start()
    gc.freeze()  # what was there before the fork stays: collections need not look through all of torch


def _obey_the_parent() -> None:
    """End this process when the one that started it says so with SIGTERM; others may say what they like."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
