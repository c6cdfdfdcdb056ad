"""Worker processes for preparing and checking shards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from typing import Any


def worker_pool(processes: int, begin: Callable[..., None] | None = None, *given: Any) -> ProcessPoolExecutor:
    """Processes that leave Ctrl-C to their parent, and end when it does, even by `kill -9`.

    They are spawned, not forked: a progress bar runs in a thread, whose locks a forked child might hold for ever.

    Args:
        processes: how many.
        begin: called first in each of them.
        given: its arguments.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, _begin, (begin, given))


def _begin(begin: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*given)


def _end_with_parent() -> None:
    """A killed parent closes no queue, so that its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    connection.wait([parent.sentinel])
    os._exit(1)
