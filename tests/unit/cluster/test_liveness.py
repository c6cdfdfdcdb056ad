"""Ranks hear each other's beats through a real store, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from vit_efficient.cluster.liveness import Liveness, Verdict, run_store

LOST = 6.0  # seconds; a thread on a busy machine may not run for two of them
RANK = """
import os, sys, time
from vit_efficient.cluster.liveness import Liveness, Verdict, run_store
rank = int(sys.argv[1])
me = Liveness(run_store(20.0), rank, 3, lost_after=float(sys.argv[2]), lost_code=75)
me.register()
print("registered", flush=True)
sys.stdin.readline()
me.start()
print("started", flush=True)
until = time.monotonic() + 240
while time.monotonic() < until:
    if (verdict := me.verdict()) is not None:
        print(verdict.text, flush=True)
        os._exit(verdict.code)  # as the guard ends a process: a thread may be inside the store's C++
    time.sleep(0.05)
"""


class Ranks:
    """Ranks 1 and 2 in processes, rank 0 and the store here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(self.server.port))
        self.own = Liveness(run_store(LOST), 0, 3, lost_after=LOST, lost_code=75)
        self.own.register()
        self.others = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(LOST)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in (1, 2)
        ]  # fmt: skip
        for process in self.others:
            assert self.line(process) == "registered"
        self.own.start()
        for process in self.others:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in self.others:
            assert self.line(process) == "started"

    @staticmethod
    def line(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    def wait(self, seconds: float) -> Verdict | None:
        """Ask as often as a guard does, for so long or until there is a verdict."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (verdict := self.own.verdict()) is not None:
                return verdict
            time.sleep(0.05)
        return None

    def end(self) -> None:
        self.own.leave()
        for process in self.others:
            process.kill()
            process.wait()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch):
    made = Ranks(monkeypatch)
    yield made
    made.end()


@pytest.mark.slow
def test_all_well_then_one_dies(ranks: Ranks) -> None:
    assert ranks.wait(2 * LOST) is None
    ranks.others[1].kill()
    verdict = ranks.wait(10 * LOST)
    assert verdict is not None
    assert f"rank 2 (pid {ranks.others[1].pid} on {os.uname().nodename}) has died" in verdict.text
    assert verdict.code == 75
    ranks.own.announce(verdict)
    assert ranks.line(ranks.others[0]) == verdict.text
    assert ranks.others[0].wait(60) == 75


@pytest.mark.slow
def test_who_leaves_in_order_is_not_missed_and_who_fails_is_heard(ranks: Ranks) -> None:
    ranks.own.announce(Verdict("rank 0 failed. The disk is full", 2))
    ranks.own.announce(Verdict("something else", 3))
    for process in ranks.others:
        assert ranks.line(process) == "rank 0 failed. The disk is full"
        assert process.wait(60) == 2
    verdict = ranks.wait(10 * LOST)
    assert verdict == Verdict("rank 0 failed. The disk is full", 2)


@pytest.mark.slow
def test_the_store_and_rank_0_are_gone(ranks: Ranks) -> None:
    ranks.own.leave()
    ranks.own._store.set("beat/0", "not left")  # as if it had been killed; leaving is no death
    for process in ranks.others:
        assert f"rank 0 (pid {os.getpid()}" in ranks.line(process)
        assert process.wait(60) == 75


@pytest.mark.slow
def test_a_process_that_was_stopped_itself_accuses_nobody(ranks: Ranks) -> None:
    for process in ranks.others:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(0.3)
    time.sleep(2 * LOST)  # nobody asks here meanwhile, as in a process that is stopped
    for process in ranks.others:
        os.kill(process.pid, signal.SIGCONT)
    assert ranks.wait(LOST / 2 + 1) is None


def test_leaving_is_no_death() -> None:
    store = HashStore()
    first, second = (Liveness(store, rank, 2, lost_after=4.0, lost_code=75) for rank in (0, 1))
    for one in (first, second):
        one.register()
    for one in (first, second):
        one.start()
    second.leave()
    until = time.monotonic() + 6
    while time.monotonic() < until:
        assert first.verdict() is None
        time.sleep(0.05)
    first.leave()


def test_the_first_announcement_counts() -> None:
    store = HashStore()
    first, second = (Liveness(store, rank, 2, lost_after=10.0, lost_code=75) for rank in (0, 1))
    for one in (first, second):
        one.register()
    for one in (first, second):
        one.start()
    second.announce(Verdict("the disk is full", 2))
    second.announce(Verdict("the connection is broken", 1))
    until = time.monotonic() + 60
    while None in (found := [one.verdict() for one in (first, second)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert found == [Verdict("the disk is full", 2)] * 2
    for one in (first, second):
        one.leave()


def test_an_announcement_is_known_to_be_in_the_store() -> None:
    """And where the store is gone, or the announcement late, nobody waits for ever."""
    store = HashStore()
    first, second = (Liveness(store, rank, 2, lost_after=1.0, lost_code=75) for rank in (0, 1))
    for one in (first, second):
        one.register()
    first.announce(Verdict("the disk is full", 2))
    assert not first.told(0.1)  # it does not beat yet
    first.start()
    assert first.told(60)
    assert "the disk is full" in store.get("verdict").decode()
    second.start()
    second.leave()
    second.announce(Verdict("too late", 1))
    assert not second.told(60)
    first.leave()
