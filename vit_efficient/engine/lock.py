"""One job at a time in a run's folder.

The lock is a POSIX record lock (`fcntl`) on a file in the folder. The kernel, or on NFS the server, drops it when its
process ends, however it ends; so there is nothing to clean up after `kill -9`, and neither clock nor host name decides
anything: what the file says of its holder is for people. It is not `flock`, since workers that are forked from the
process would share that, and hold it on after its death.

A process that closes any handle of the file drops its lock: nothing else may open it here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from socket import gethostname
from types import TracebackType
from typing import IO

from vit_efficient.errors import UserError

LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Holds a run's folder within a `with` block.

    Args:
        folder: of the run; made if it is not there.
        held: whether this process is the one to hold it (rank 0 does, for all ranks).
    """

    def __init__(self, folder: Path, *, held: bool = True) -> None:
        self.path = folder / LOCK
        self.unsupported: str | None = None
        self._held = held
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Raises:
        UserError: another process holds it, named with host, pid and since when; or the folder cannot be written.
        """
        if not self._held:
            return self
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")  # closing it gives the lock back
        except OSError as error:
            raise UserError(
                f"Cannot write into the run folder {self.path.parent}: {error}. Set `run.dir` to another."
            ) from error
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            self._file.close()
            self._file = None
            if error.errno in UNSUPPORTED:
                self.unsupported = (
                    f"{self.path.parent} cannot be locked ({error.strerror}): see to it that no second job uses it"
                )
                return self
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise UserError(
                f"Another job is at work in {self.path.parent}: {holder}.\n"
                "  Wait until it has ended, or end it; or choose another `run.dir`."
            ) from error
        self._file.truncate(0)
        json.dump({"host": gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"),
                   "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}, self._file)  # fmt: skip
        self._file.flush()
        return self

    def _holder(self) -> str:
        assert self._file is not None
        self._file.seek(0)
        try:
            said = json.load(self._file)
        except json.JSONDecodeError:  # it has only just been taken
            return "it has only just begun"
        job = f", job {said['job']}" if said["job"] else ""
        return f"pid {said['pid']} on {said['host']}{job}, since {said['since']}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()  # the file stays: to remove it would let a third process lock another one of its name
            self._file = None
