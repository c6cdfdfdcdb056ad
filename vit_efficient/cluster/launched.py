"""Processes that Lightning started on this machine: their parent knows at once, and exactly, how each of them ended.

Lightning's own observer kills the parent with SIGKILL, in silence, as soon as a child ends with an error; here the
children are taken out of its hands, and their end becomes a message.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from socket import gethostname
from typing import Any

from vit_efficient.cluster.liveness import Verdict

_started: list[subprocess.Popen[bytes]] = []  # by this process: the second run in it has the children of the first


class Children:
    """The processes that this one started through Lightning's launcher; none where something else started them all.

    Args:
        launcher: `trainer.strategy.launcher`, perhaps None; it may start its processes later.
        first: the global rank of its first child.
        lost_code: exit code for a child that was killed.
    """

    def __init__(self, launcher: Any, first: int, lost_code: int) -> None:
        self._launcher, self._first, self._lost_code = launcher, first, lost_code

    @property
    def processes(self) -> Sequence[subprocess.Popen[bytes]]:
        """In the order of their ranks."""
        if procs := getattr(self._launcher, "procs", ()):
            _started[:] = procs
        return _started

    def verdict(self) -> Verdict | None:
        """How a child ended that should not have; None while all is well."""
        processes = self.processes
        for thread in threading.enumerate() if processes else ():
            if thread.name == "child-process-observer":
                vars(thread)["_child_processes"] = []  # with none to look after, it ends
        for number, process in enumerate(processes):
            code = process.poll()
            if not code:
                continue
            name = f"rank {self._first + number} (pid {process.pid} on {gethostname()})"
            if code > 0:
                return Verdict(f"{name} ended with exit code {code}.", code)
            why = signal.Signals(-code).name
            hint = "; the kernel does that when memory runs out" if -code == signal.SIGKILL else ""
            return Verdict(f"{name} has died: killed by {why}{hint}.", self._lost_code)
        return None


class Parent:
    """The process that started this one as a further rank. It may be gone before this one can look for it.

    Args:
        rank, pid: of that process.
        lost_code: exit code where it is gone.
    """

    def __init__(self, rank: int, pid: int, lost_code: int) -> None:
        self._rank, self._pid, self._lost_code = rank, pid, lost_code

    def verdict(self) -> Verdict | None:
        """Whether that process is gone."""
        if os.getppid() == self._pid:
            return None
        return Verdict(f"rank {self._rank} (pid {self._pid} on {gethostname()}) has died.", self._lost_code)
