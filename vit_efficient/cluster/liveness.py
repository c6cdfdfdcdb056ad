"""Notices that a process of the run has died, on whatever node, and says which.

Without it a death shows late or badly. NCCL waits for the collective time-out, ten minutes or more. gloo fails at once,
with the port number of somebody. Lightning's launcher kills the process that people look at, without a word.

Every rank beats: a thread raises a counter in the run's TCPStore, which is where torch's own rendezvous lives
(``MASTER_ADDR:MASTER_PORT``), over a connection of its own. Rank 0 reads all counters in one request and the others
rank 0's, so a beat costs a few requests a process, however many there are. Nobody's clock is compared with another's:
what counts is for how long, by the reader's monotonic clock, a counter has stood still.

The beat says that a process is there, not that it gets on. A long checkpoint, compilation or evaluation does not stop
the thread; only death, SIGSTOP, or a node or network that is gone does. A process that was itself stopped for a while
(Ctrl-Z, a suspended job) has heard nobody meanwhile, and begins to listen anew.

Who leaves with an error says so in the same store, so that the others need not wait for silence.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from socket import gethostname

from torch.distributed import PrefixStore, Store, TCPStore

BEATS = 10  # in the time after which a silent process is taken to be dead


@dataclass(frozen=True)
class Verdict:
    """Why all processes of the run end now.

    Args:
        text: for a person; names who died or failed.
        code: what the processes exit with.
    """

    text: str
    code: int


def run_store(timeout: float) -> Store:
    """A connection of our own to the store that the run's processes met at.

    Not the process group's connection: that one is locked while torch waits for others in it.

    Args:
        timeout: seconds that a request may take.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    # torchrun keeps its store when it starts the processes again: what they left in it is not ours.
    return PrefixStore(f"liveness/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Liveness:
    """One rank's heartbeat, and its ear for the others'.

    Args:
        store: where the ranks meet; used by this object's thread alone.
        rank, world: of this process.
        lost_after: seconds of silence after which another process is taken to be dead.
        lost_code: exit code for that.
    """

    def __init__(self, store: Store, rank: int, world: int, *, lost_after: float, lost_code: int) -> None:
        self.rank, self.world, self.lost_after, self.lost_code = rank, world, lost_after, lost_code
        self.beat = lost_after / BEATS
        self._store = store
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None
        self._mine: Verdict | None = None
        self._told = False  # `_mine` is in the store
        self._settled = threading.Event()  # it is, or the thread has ended and it never will be
        self._alarm = False
        self._heard = time.monotonic()  # when the store last answered
        self._beats: dict[int, tuple[str, float]] = {}  # rank: its counter, and since when it has stood there
        self._names: dict[int, str] = {}
        self._looked = time.monotonic()
        self._count = 0
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)

    @property
    def own_name(self) -> str:
        """What this process is called in messages, its own and the others'."""
        return f"rank {self.rank} (pid {os.getpid()} on {gethostname()})"

    def register(self) -> None:
        """Say who this is. Every rank must have done so before any of them starts."""
        self._store.set(f"name/{self.rank}", self.own_name)
        self._store.set(f"beat/{self.rank}", "0")

    def start(self) -> None:
        """Learn the others' names and begin to beat."""
        others = range(self.world) if self.rank == 0 else (0,)
        names = self._store.multi_get([f"name/{other}" for other in others])
        self._names = {other: name.decode() for other, name in zip(others, names, strict=True)}
        self._thread.start()

    def name(self, rank: int) -> str:
        """How a process is called in messages."""
        return self._names.get(rank, f"rank {rank}")

    def announce(self, verdict: Verdict) -> None:
        """Tell all processes, at the next beat, why they are to end; who is first counts."""
        with self._lock:
            self._mine = self._mine or verdict

    def told(self, seconds: float) -> bool:
        """Wait until what was announced is in the store. False if it is not there in time, or can no longer come."""
        self._settled.wait(seconds)
        return self._told

    def raise_alarm(self) -> None:
        """Something looks as if a process had died (a broken connection): be satisfied with half the silence."""
        self._alarm = True

    def leave(self) -> None:
        """End in order: from here on this process's silence means nothing."""
        self._stop.set()
        self._thread.join(2 * self.beat + 1)

    def verdict(self) -> Verdict | None:
        """Why the run must end, or None. To be asked at least a few times in `lost_after` seconds."""
        now = time.monotonic()
        with self._lock:
            slept = now - self._looked > self.lost_after / 2
            self._looked = now
            if slept:  # this process was stopped, and could not have heard anybody
                self._heard = now
                self._beats = {rank: (count, now) for rank, (count, _) in self._beats.items()}
            if self._verdict is not None:
                return self._verdict
            limit = self.lost_after / 2 if self._alarm else self.lost_after
            if now - self._heard > limit:
                where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}".strip(":")
                text = f"{self.name(0)} has died, or its node or the network is gone: nothing answers at {where}."
                return Verdict(text, self.lost_code)
            silent = {r: now - since for r, (count, since) in self._beats.items() if count != "left"}
            lost = sorted(rank for rank, seconds in silent.items() if seconds > limit)
            if not lost:
                return None
            named = ", ".join(self.name(rank) for rank in lost[:8])
            named += f" and {len(lost) - 8} more" if len(lost) > 8 else ""
            has = "have" if len(lost) > 1 else "has"
            return Verdict(f"{named} {has} died: not heard from for {silent[lost[0]]:.0f} s.", self.lost_code)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.wait(self.beat):
                self._round()
            self._store.set(f"beat/{self.rank}", "left")
        except RuntimeError:  # torch.distributed.DistError: the store is gone, and so `_heard` grows old
            return
        finally:
            self._settled.set()

    def _round(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self.rank}", str(self._count))
        with self._lock:
            mine = self._mine
        if mine is not None:
            self._store.compare_set("verdict", "", json.dumps(asdict(mine)))
            self._told = True
            self._settled.set()
        if self._alarm:
            self._store.set("alarm", "1")
        verdict = None
        if self._store.check(["verdict"]):
            verdict = Verdict(**json.loads(self._store.get("verdict")))
        self._alarm = self._alarm or self._store.check(["alarm"])
        others = [rank for rank in self._names if rank != self.rank]
        counts = self._store.multi_get([f"beat/{rank}" for rank in others])
        now = time.monotonic()
        with self._lock:
            self._verdict, self._heard = verdict, now
            for rank, count in zip(others, (c.decode() for c in counts), strict=True):
                if rank not in self._beats or self._beats[rank][0] != count:
                    self._beats[rank] = (count, now)
