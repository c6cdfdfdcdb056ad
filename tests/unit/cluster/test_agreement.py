"""Two real processes agree on what they do after the same step, and no device is asked for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vit_efficient.cluster.agreement import Agreement

START = """
import json, os, sys, warnings
import torch, torch.distributed as dist
from vit_efficient.cluster.agreement import Agreement
rank, file = int(sys.argv[1]), sys.argv[2]
own = json.loads(sys.argv[3])[rank]
"""
MEET = """
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
agreement, seen = Agreement(), []
agreement.open(torch.device("cpu"))
"""
STEPS = """
for flags in own:
    seen.append(agreement.outcome(flags))
    agreement.begin(flags)
seen.append(agreement.outcome((0, 0)))
agreement.begin(own[0])
seen.append(agreement.at_once(own[-1]))
print(json.dumps(seen))
"""


def agree(folder: Path, code: str, *flags: list[tuple[int, int]]) -> list[Any]:
    """What each of two processes saw, which began with these flags in their steps."""
    words = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen([*words, str(rank), str(folder / "meet"), json.dumps(flags)], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        return [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_every_rank_hears_of_a_step_at_the_next_one(tmp_path: Path) -> None:
    """One that heard nothing stops too; of two signals the weightier counts, and rank 0's wish for a checkpoint.

    At an epoch's end they hear at once.
    """
    first = [(0, 0), (1, 0), (0, 1), (2, 0)]
    second = [(0, 0), (0, 0), (3, 0), (1, 0)]
    expected = [[0, 0], [0, 0], [1, 0], [3, 1], [2, 0], [2, 0]]
    assert agree(tmp_path, START + MEET + STEPS, first, second) == [expected] * 2


NO_GLOO = """
whole = dist.new_group
def without(*words, **named):
    if rank == 1:
        raise RuntimeError("Unable to resolve hostname to a (local) address")
    return whole([0], backend="gloo")
dist.new_group = without
warnings.simplefilter("error")
try:
    Agreement().open(torch.device("cpu"))
except UserWarning as warning:
    said = str(warning)
warnings.simplefilter("ignore")
agreement = Agreement()
agreement.open(torch.device("cpu"))
seen = [said]
"""


@pytest.mark.slow
def test_hosts_that_gloo_cannot_connect(tmp_path: Path) -> None:
    """One rank's failure is known to all, which say so and agree over the group that they train with."""
    first, second = agree(tmp_path, START + MEET + NO_GLOO + STEPS, [(0, 0), (1, 0)], [(2, 0), (0, 0)])
    assert "gloo cannot connect the hosts (Unable to resolve hostname" in second[0]
    assert "another rank says why" in first[0]
    assert "GLOO_SOCKET_IFNAME" in first[0]
    assert first[1:] == second[1:] == [[0, 0], [2, 0], [1, 0], [1, 0]]


def test_a_process_that_is_alone_need_not_wait() -> None:
    agreement = Agreement()
    agreement.begin((0, 0))
    assert agreement.outcome((2, 1)) == (2, 1)
    assert agreement.at_once((0, 1)) == (0, 1)


BUSY = """
torch.cuda.set_device(rank)
dist.init_process_group("nccl", init_method=f"file://{file}", rank=rank, world_size=2)
agreement = Agreement()
agreement.open(torch.device("cuda", rank))
agreement.at_once((0, 0))
torch.cuda._sleep(20_000_000_000)  # cycles: ten seconds
done = torch.cuda.Event()
done.record()
seen = [agreement.at_once(own[0]), done.query()]
print(json.dumps(seen))
"""


@pytest.mark.gpu
@pytest.mark.slow
def test_no_device_is_waited_for(tmp_path: Path) -> None:
    """The ranks have agreed while both GPUs are busy with what was queued before."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert agree(tmp_path, START + BUSY, [(1, 0)], [(2, 0)]) == [[[2, 0], False]] * 2
