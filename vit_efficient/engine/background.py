"""Work that training does not wait for: one thread that does things in order, and errors that are not lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor


class Writer:
    """Does what it is given, at once or, ``asynchronous``, in a thread, one after the other.

    After an error nothing more is done; `check` and `wait` raise it.
    """

    def __init__(self, *, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: list[Future[None]] = []
        self._failed = False

    def do(self, task: Callable[[], None]) -> None:
        """Run ``task``, or queue it behind what was queued before."""
        if self._pool is None:
            task()
        else:
            self._pending.append(self._pool.submit(self._run, task))

    def check(self) -> None:
        """Raise what went wrong in what is done by now."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Let everything be done; raise what went wrong."""
        while self._pending:
            self._pending.pop(0).result()

    def _run(self, task: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            task()
        except BaseException:
            self._failed = True
            raise


def snapshot(tree: Any) -> Any:
    """A copy in the CPU's memory that shares nothing with the original, whatever happens to that afterwards."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: snapshot(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(snapshot(value) for value in tree)
    return tree
