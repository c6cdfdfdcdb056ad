"""Worker processes for preparing and checking shards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

from vit_efficient.errors import DataError


@contextmanager
def worker_pool(
    processes: int, remedy: str, begin: Callable[..., None] | None = None, *given: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave Ctrl-C to their parent, and end when it does, even by `kill -9`.

    They are spawned, not forked: a progress bar runs in a thread, whose locks a forked child might hold for ever.
    What is still waiting when the block ends is given up.

    Args:
        processes: how many.
        remedy: what to do when one of them is killed, for the message.
        begin: called first in each of them.
        given: its arguments.

    Raises:
        DataError: one of them was killed.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin, (begin, given))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            f"One of the {processes} processes that share the work was killed, perhaps for want of memory. {remedy}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


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
