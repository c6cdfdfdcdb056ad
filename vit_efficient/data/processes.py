"""Worker processes for preparing and checking shards."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any

from vit_efficient.data.workers import signals_held
from vit_efficient.errors import DataError

_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@contextmanager
def worker_pool(
    processes: int, remedy: str, begin: Callable[..., None] | None = None, *given: Any
) -> Iterator[Executor]:
    """Processes that leave Ctrl-C and Slurm's signals to their parent, and end when it does, even by `kill -9`.

    Each has a pipe of its own, and a thread here that waits at it: whenever a process dies, in the middle of a result
    too, its pipe ends, and with it the wait. (With `ProcessPoolExecutor` all write into one pipe, which stays open
    for as long as one of them lives: half a result is waited for without end.) They are spawned, not forked: a
    progress bar runs in a thread, whose locks a forked child might hold for ever. Work still waiting or under way when
    the block ends is given up.

    Args:
        processes: how many.
        remedy: what to do when one of them is killed, for the message.
        begin: called first in each of them.
        given: its arguments.

    Raises:
        DataError: one of them was killed; raised by the future of the work that it had in hand, and of later work
            that would have been its own.
    """
    killed = f"One of the {processes} processes that share the work was killed, perhaps for want of memory. {remedy}"
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    free: SimpleQueue[_Worker] = SimpleQueue()
    mine = threading.local()

    def choose() -> None:
        mine.worker = free.get()

    try:
        with ThreadPoolExecutor(processes, "worker", choose) as threads:
            try:
                for _ in range(processes):
                    workers.append(_Worker(context, killed, begin, given))
                    workers[-1].start()
                    free.put(workers[-1])
                yield _Pool(threads, lambda: mine.worker)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.end()
    finally:
        for worker in workers:
            worker.pipe.close()  # now that no thread waits at it


class _Pool(Executor):
    """Work goes to a thread, and by it to the thread's process."""

    def __init__(self, threads: Executor, worker: Callable[[], _Worker]) -> None:
        self._threads = threads
        self._worker = worker

    def submit(self, work, /, *args, **named):  # type: ignore[no-untyped-def]  # typed by Executor
        return self._threads.submit(lambda: self._worker().call(work, args, named))


class _Worker:
    """One process and this end of its pipe."""

    def __init__(self, context: Any, killed: str, begin: Callable[..., None] | None, given: tuple[Any, ...]) -> None:
        self._killed = killed
        self._begin: _Call | None = (begin, given, {}) if begin is not None else None
        self.pipe, self._theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._theirs,), daemon=True)

    def start(self) -> None:
        """Start it; what holds it can `end` it, even if a signal interrupts this."""
        resource_tracker.ensure_running()  # before: its own start would make this thread hear signals again
        with signals_held():  # which it inherits
            self._process.start()
        self._theirs.close()  # the process holds the only one now: the pipe ends with it

    def call(self, work: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the work returns or raises, there."""
        if self._begin is not None:  # not sent while they start: it may be large, and all start at once
            self._ask(*self._begin)
            self._begin = None
        return self._ask(work, args, named)

    def _ask(self, work: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        message = ForkingPickler.dumps((work, args, named))
        try:
            self.pipe.send_bytes(message)
            done, result = self.pipe.recv()
        except (EOFError, OSError) as error:  # the latter in the middle of a result
            raise DataError(self._killed) from error
        if not done:
            raise result
        return result

    def end(self) -> None:
        """It has nothing that must be kept. A thread at its pipe wakes."""
        if self._process.pid is not None:
            self._process.kill()  # it is deaf to SIGTERM
            self._process.join()


def _serve(pipe: connection.Connection) -> None:
    """All that a worker does: calls, one after the other, until its parent ends it or is gone."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(message))


def _answer(message: bytes) -> Any:
    """To (work, args, named): (True, its result) or (False, its error)."""
    try:
        work, args, named = ForkingPickler.loads(message)
        answer = True, work(*args, **named)
    except (Exception, SystemExit) as error:
        error.add_note("".join(traceback.format_exception(error)))  # where: it does not travel otherwise
        answer = False, error
    try:
        return ForkingPickler.dumps(answer)
    except Exception as error:  # whatever a class raises
        return ForkingPickler.dumps((False, TypeError(f"a {type(answer[1]).__name__} cannot be sent: {error}")))


def _end_with_parent() -> None:
    """A process in the middle of long work would not see before its end that nobody waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    connection.wait([parent.sentinel])
    os._exit(1)
