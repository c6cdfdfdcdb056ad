"""Loader processes under the signals that Slurm sends to all of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

# A process with a loader that never ends: it says its worker's id, then a dot for each batch; SIGUSR1 ends it.
PROGRAM = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, IterableDataset
from vit_efficient.data.stream import init_worker

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            time.sleep(0.05)
            yield os.getpid()

def leave(*_):
    raise SystemExit(7)

signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGUSR1, leave)
batches = iter(DataLoader(Endless(), batch_size=None, num_workers=1, worker_init_fn=init_worker))
for worker in batches:
    print(worker, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_worker_outlives_a_signal_to_the_step(number: signal.Signals) -> None:
    """A worker that died would raise in its parent, perhaps while it saves. Its parent can still end it."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        worker = int(process.stdout.readline())
        os.kill(worker, number)
        assert {int(process.stdout.readline()) for _ in range(20)} == {worker}
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 7, errors
        assert "killed by signal" not in errors
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{worker}")
    finally:
        process.kill()
        process.wait()
