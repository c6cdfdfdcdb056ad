"""Notices that a run gets nowhere although all its processes are alive, and writes down where they stand.

Progress is whatever the run marks: a finished micro-batch, an evaluated batch, a written checkpoint. The stacks of all
threads go into the run's folder, for each rank its own file, so that the one that everybody waits for can be told from
those that wait.
"""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path
from socket import gethostname

SLACK = 1.5  # times the limit: when C code that never gives the interpreter back is ended from outside Python


class Watchdog:
    """Counts the seconds since the last sign of progress.

    Args:
        folder: where the stacks go; made when there are any.
        rank: names the file.
        limit: seconds without progress after which a run is taken to hang.
    """

    def __init__(self, folder: Path, rank: int, limit: float) -> None:
        self.path = folder / f"rank-{rank:05d}.txt"
        self.limit = limit
        self.last = "the start"
        self._rank = rank
        self._marked = self._looked = time.monotonic()

    def mark(self, what: str) -> None:
        """Something was achieved. Cheap enough for every step."""
        self.last, self._marked = what, time.monotonic()

    def stalled(self) -> float | None:
        """Seconds without progress, once there are too many. To be asked every second or so.

        Whoever asks late was stopped together with the work (Ctrl-Z, a suspended job): that time does not count.
        """
        now = time.monotonic()
        if now - self._looked > max(5.0, self.limit / 4):
            self._marked += now - self._looked
        self._looked = now
        seconds = now - self._marked
        return seconds if seconds > self.limit else None

    def dump(self, why: str) -> Path:
        """Write the Python stacks of all threads, and say where.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(
                f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank}, pid {os.getpid()} on {gethostname()}\n"
                f"{why}\nlast sign of progress here: {self.last}, {time.monotonic() - self._marked:.0f} s ago\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
        return self.path

    def hold_off(self) -> None:
        """Put off the last resort: a timer outside Python that writes the stacks to stderr and ends the process.

        It fires, with exit code 1, only if this is not called again for `SLACK` times the limit: some C code holds the
        interpreter's lock, so that no thread of Python runs any more.
        """
        faulthandler.dump_traceback_later(SLACK * self.limit, exit=True, file=2)

    def close(self) -> None:
        """Nobody is watched any more."""
        faulthandler.cancel_dump_traceback_later()
