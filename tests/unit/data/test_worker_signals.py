"""Loader processes under the signals that Slurm sends to all of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vit_efficient.data.workers import signals_held

# A process with a loader that never ends: for each batch it says which worker it is from. SIGUSR1 ends it, when
# LOADER has one more; its workers do EARLY as soon as torch has given them its handlers, before anything of ours.
PROGRAM = """
import os, signal, sys, time
from torch.utils.data import IterableDataset
from torch.utils.data._utils import signal_handling
from vit_efficient.data.loader import Cursor, EvalLoader, TrainLoader, Workers

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            time.sleep(0.05)
            yield {"worker": os.getpid(), "skipped": []}

def leave(*_):
    raise SystemExit(7)

set_handlers = signal_handling._set_worker_signal_handlers

def set_handlers_and_more():
    set_handlers()
    EARLY

signal_handling._set_worker_signal_handlers = set_handlers_and_more
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, leave)
for batch in LOADER:
    print(batch["worker"], flush=True)
"""
TRAIN = "TrainLoader(lambda start: Endless(), Cursor(), 10**6, 1, Workers(1))"
EVAL = "EvalLoader(Endless(), 10**6, Workers(1))"
SIGNALS = [int(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


def test_signals_are_heard_again_after_one() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(KeyboardInterrupt), signals_held():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@contextmanager
def running(loader: str, early: str = "pass") -> Iterator[subprocess.Popen[str]]:
    program = PROGRAM.replace("LOADER", loader).replace("EARLY", early)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def workers(process: subprocess.Popen[str], batches: int) -> set[str]:
    """Which workers the next batches come from."""
    assert process.stdout is not None
    return {process.stdout.readline().strip() for _ in range(batches)}


@pytest.mark.parametrize("loader", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_worker_outlives_signals_to_the_step(loader: str) -> None:
    """A worker that died would raise in its parent, perhaps while it saves. Its parent can still end it."""
    with running(loader) as process:
        (worker,) = workers(process, 1)
        for number in SIGNALS:
            os.kill(int(worker), number)
            assert workers(process, 10) == {worker}
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 7, errors
        assert "killed by signal" not in errors
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{worker}")


@pytest.mark.parametrize("loader", [TRAIN, EVAL], ids=["train", "eval"])
def test_a_worker_outlives_signals_at_its_start(loader: str) -> None:
    """Where it has torch's handlers, which end it, and not yet ours."""
    with running(loader, f"for number in {SIGNALS}: os.kill(os.getpid(), number)") as process:
        (worker,) = workers(process, 1)
        assert worker, process.communicate()[1]
        assert workers(process, 5) == {worker}


def test_the_main_process_hears_what_came_while_workers_started() -> None:
    """Held back for as long as workers are started, not lost."""
    with running(TRAIN, "os.kill(os.getppid(), signal.SIGUSR1); time.sleep(0.2)") as process:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 7, errors
