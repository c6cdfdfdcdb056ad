"""Signals become a flag; handlers are given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vit_efficient.cluster.preempt import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_sets_the_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopSignals()
    stop.install()
    try:
        assert not stop.agreed(torch.device("cpu"))
        os.kill(os.getpid(), number)
        assert stop.agreed(torch.device("cpu"))
        assert stop.received == number
    finally:
        stop.restore()
    assert signal.getsignal(number) is before


def test_second_interrupt_is_immediate() -> None:
    stop = StopSignals()
    stop.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.restore()


RANKS = """
import signal, sys
import torch, torch.distributed as dist
from vit_efficient.cluster.preempt import StopSignals
rank, file, heard = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
stop = StopSignals()
print(stop.agreed(torch.device("cpu")))
if heard != "nothing":
    stop.received = signal.Signals[heard]
print(stop.agreed(torch.device("cpu")).name)
"""


@pytest.mark.parametrize("heard", [("SIGUSR1", "nothing"), ("SIGTERM", "SIGUSR1")])
def test_ranks_agree_on_the_signal(heard: tuple[str, str], tmp_path: Path) -> None:
    """One that heard nothing stops too; who cancels is not overruled by a time limit at the same moment."""
    words = [[sys.executable, "-c", RANKS, str(rank), str(tmp_path / "meet"), heard[rank]] for rank in range(2)]
    processes = [subprocess.Popen(word, stdout=subprocess.PIPE, text=True) for word in words]
    try:
        printed = [process.communicate(timeout=120)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert printed == [["None", heard[0]]] * 2
