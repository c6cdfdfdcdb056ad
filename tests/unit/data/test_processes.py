"""Worker processes: what they give, and what becomes of work when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import pytest

from vit_efficient.data.processes import worker_pool
from vit_efficient.errors import DataError


def double(number: int) -> int:
    return 2 * number


def test_results_are_in_order_and_none_is_left() -> None:
    with worker_pool(2, "") as pool:
        assert list(pool.map(double, range(50))) == [2 * number for number in range(50)]
        assert {task.result() for task in as_completed([pool.submit(double, 1), pool.submit(double, 2)])} == {2, 4}
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


_given = 0


def keep(number: int) -> None:
    global _given
    _given = number


def kept() -> tuple[int, int]:
    return os.getpid(), _given


def test_every_process_begins_with_what_it_is_given() -> None:
    with worker_pool(2, "", keep, 7) as pool:
        given = [pool.submit(kept).result() for _ in range(8)]
    assert {number for _, number in given} == {7}
    assert os.getpid() not in dict(given)


def fail(path: Path) -> None:
    path.read_bytes()


def test_an_error_of_the_work_is_that_error_and_says_where(tmp_path: Path) -> None:
    with worker_pool(2, "") as pool:
        with pytest.raises(FileNotFoundError, match="absent") as caught:
            pool.submit(fail, tmp_path / "absent").result()
        assert any("in fail" in note for note in caught.value.__notes__)
        assert pool.submit(double, 3).result() == 6


def leave() -> None:
    raise SystemExit(3)


class Poison:
    """Can be sent, and not be read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return int, ("poison",)


def test_what_ends_no_process_is_not_said_to_have_killed_one() -> None:
    with worker_pool(1, "") as pool:
        with pytest.raises(SystemExit):
            pool.submit(leave).result()
        with pytest.raises(ValueError, match="poison"):
            pool.submit(double, Poison()).result()  # type: ignore[arg-type]
        assert pool.submit(double, 3).result() == 6


IGNORING = """
import signal
from vit_efficient.data.processes import worker_pool
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with worker_pool(2, "") as pool:
        print(pool.submit(abs, -7).result())
"""


def test_workers_end_where_sigterm_is_ignored(tmp_path: Path) -> None:
    """As under a wrapper that traps it: they inherit that."""
    (tmp_path / "program.py").write_text(IGNORING)
    said = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout == "7\n"


DEAF = """
import os, signal
from vit_efficient.data.processes import worker_pool
def ask_to_stop():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    return 7
if __name__ == "__main__":
    with worker_pool(2, "") as pool:
        print([pool.submit(ask_to_stop).result() for _ in range(8)])
"""


def test_signals_are_left_to_the_parent(tmp_path: Path) -> None:
    """Slurm sends them to all processes: one that died first would make an error of what is none.

    In a process of its own, where multiprocessing starts its resource tracker with the first worker.
    """
    (tmp_path / "program.py").write_text(DEAF)
    said = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=240, check=False
    )
    assert said.stdout == f"{[7] * 8}\n", said.stderr


def test_a_signal_while_a_worker_starts_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deaf to SIGTERM, it would be waited for without end when this process ends."""
    process = multiprocessing.get_context("spawn").Process
    whole = process.start

    def start(self: Any) -> None:
        whole(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(process, "start", start)
    with pytest.raises(KeyboardInterrupt), worker_pool(2, ""):
        pass
    assert not multiprocessing.active_children()


def nothing_to_send() -> object:
    return threading.Lock()


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with worker_pool(1, "") as pool:
        with pytest.raises(TypeError, match=r"a lock cannot be sent"):
            pool.submit(nothing_to_send).result()
        with pytest.raises(Exception, match="pickle"):
            pool.submit(double, threading.Lock()).result()
        assert pool.submit(double, 3).result() == 6


def die_while_it_is_sent(size: int) -> bytes:
    """A thread ends the process when its parent has read a quarter of the result."""

    def read() -> int:
        return int(Path(f"/proc/{os.getppid()}/io").read_text().split()[1])

    before = read()

    def watch() -> None:
        while read() - before < size // 4:
            time.sleep(0.0001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return bytes(size)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io, to know how much was read")
@pytest.mark.timeout(60)
def test_killed_in_the_middle_of_its_result() -> None:
    """Half a result is not waited for, though the other process lives on."""
    with worker_pool(2, "Do this.") as pool:
        dying, other = pool.submit(die_while_it_is_sent, 1 << 28), pool.submit(double, 1)
        with pytest.raises(DataError, match=r"One of the 2 processes.* was killed.* Do this\."):
            dying.result()
        assert other.result() == 2
    assert not multiprocessing.active_children()


def test_killed_while_it_waits_for_work() -> None:
    with worker_pool(1, "Do this.") as pool:
        pool.submit(double, 1).result()
        (process,) = multiprocessing.active_children()
        process.kill()
        process.join()
        with pytest.raises(DataError, match="was killed"):
            pool.submit(double, 1).result()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_work_that_nobody_waits_for_is_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match="enough"), worker_pool(2, "") as pool:  # noqa: PT012
        pool.submit(double, 1).result()
        for _ in range(8):
            pool.submit(sleep, 60.0)
        raise ValueError("enough")
    assert time.monotonic() - began < 30
    assert not multiprocessing.active_children()
