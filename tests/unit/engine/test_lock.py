"""A run's folder belongs to one job, for as long as its process lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from vit_efficient.engine.lock import RunLock
from vit_efficient.engine.rundir import RunDir
from vit_efficient.errors import UserError

HOLD = """
import os, sys, time
from pathlib import Path
from vit_efficient.engine.lock import RunLock
with RunLock(Path(sys.argv[1])):
    if sys.argv[2] == "fork" and os.fork() == 0:
        time.sleep(60)
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def holder(folder: Path, how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    return process


@pytest.mark.parametrize("how", ["alone", "fork"])  # a worker that is left over must not hold it on
def test_refused_while_the_other_lives_and_no_longer(tmp_path: Path, how: str) -> None:
    process = holder(tmp_path / "run", how)
    try:
        with (
            pytest.raises(UserError, match=f"pid {process.pid} on {os.uname().nodename}, since 20"),
            RunLock(tmp_path / "run"),
        ):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with RunLock(tmp_path / "run") as lock:
            assert lock.unsupported is None
            assert str(os.getpid()) in lock.path.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_given_back(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        pass
    process = holder(tmp_path, "alone")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_other_ranks_do_not_ask(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run", held=False):
        assert not (tmp_path / "run").exists()


def test_the_lock_does_not_make_a_folder_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with RunLock(run.path):
        run.check_new()
        run.create()
        run.recipe.touch()
        run.check_new(again=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir"), RunLock(tmp_path / "file"):
        pass
