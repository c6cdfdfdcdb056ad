"""Time limits, pre-emption, nodes that die: the same samples and the same weights as if nothing had happened."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING

import pytest
import torch

from vit_efficient.engine.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from conftest import Cluster, Desk

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def starts(desk: Desk, run: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (desk.folder / run / "slurm/attempts").read_text().splitlines()]


def assert_same_samples(desk: Desk, run: str, other: Desk, reference: str) -> None:
    """Each step's samples are those of the uninterrupted run, and a step that was lost was repeated, rank by rank.

    A rank writes its lines after a step, each rank for itself: of the step in which a node dies, the lines of the
    other node's ranks may be there and its own not. The repetition, whose lines come last, has all of them.
    """
    expected: dict[tuple[int, int], list[str]] = {}
    for epoch, step, _, key in other.audit(reference):
        expected.setdefault((epoch, step), []).append(key)
    seen: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for epoch, step, rank, key in desk.audit(run):
        seen.setdefault((epoch, step), []).append((rank, key))
    assert seen.keys() == expected.keys()
    for place, rows in seen.items():
        last = rows[-len(expected[place]) :]
        assert sorted(key for _, key in last) == sorted(expected[place]), place
        for rank in {rank for rank, _ in rows}:
            keys, once = ([key for r, key in part if r == rank] for part in (rows, last))
            assert once, (place, rank)
            assert keys == once * (len(keys) // len(once)), (place, rank)


def assert_same_state(desk: Desk, run: str, other: Desk, reference: str) -> None:
    """Weights, their average and the optimizer's moments at the end are the same to the last bit."""
    a, b = (
        read_checkpoint(d.folder / name / "checkpoints" / "last.ckpt") for d, name in ((desk, run), (other, reference))
    )
    for tree in ("state_dict", "average"):
        left, right = (c[tree]["average"] if tree == "average" else c[tree] for c in (a, b))
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []
    left, right = (c["optimizer_states"][0]["state"] for c in (a, b))
    assert [(n, k) for n in left for k, v in left[n].items() if not torch.equal(v, right[n][k])] == []


def test_time_limit(desk: Desk, cluster: Cluster, straight: Desk) -> None:
    """Slurm's own signal before the time limit: saved, requeued, resumed until the end, every step done once."""
    desk.site(warn_seconds=60)
    number = desk.start("run")
    desk.wait_for_steps("run", 2)
    with cluster.held(number):
        hours, passed, _ = cluster.job(number)["RunTime"].split(":")
        minutes = 60 * int(hours) + int(passed) + 1
        cluster.run("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
        cluster.wait_for("the requeue", lambda: cluster.job(number)["JobState"] == "PENDING")
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    desk.wait_for_end("run")
    assert len(starts(desk, "run")) == 2
    assert cluster.job(number)["Restarts"] == "1"
    log = desk.log("run")
    assert "Stopped by SIGUSR1; everything is saved" in log
    assert "told by Slurm that its time ends; starts again" in log
    assert "DUE TO TIME LIMIT" not in log
    assert_same_samples(desk, "run", straight, "straight")
    assert len(desk.audit("run")) == len(straight.audit("straight"))  # saved at the signal: no step was done twice
    assert_same_state(desk, "run", straight, "straight")


def test_without_scontrol(desk: Desk, cluster: Cluster, straight: Desk) -> None:
    """Where `scontrol` is missing the job is followed by another one that depends on it."""
    desk.site(setup=["scontrol() { echo 'scontrol: command not found' >&2; return 127; }"])
    first = desk.start("run")
    desk.wait_for_steps("run", 2)
    with cluster.held(first) as pids:
        cluster.run("scancel", "--signal=USR1", first)
        cluster.wait_for_signal(pids, signal.SIGUSR1)
    desk.wait_for_end("run")
    assert desk.number("run") != first
    assert [start["number"] for start in starts(desk, "run")] == [first, desk.number("run")]
    assert_same_samples(desk, "run", straight, "straight")
    assert_same_state(desk, "run", straight, "straight")


def test_preempted(desk: Desk, cluster: Cluster, straight: Desk) -> None:
    """A more urgent job takes the node: TERM and a time of grace; saved, and resumed when the node is free again."""
    desk.site(sbatch=["--nodelist=n1", "--exclusive"])
    number = desk.start("run")
    desk.wait_for_steps("run", 2)
    urgent = ("--partition=urgent", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
    with cluster.held(number) as pids:
        cluster.run("sbatch", *urgent)
        cluster.wait_for_signal(pids, signal.SIGTERM)
    desk.wait_for_end("run")
    assert int(cluster.job(number)["Restarts"]) == 1
    assert "Stopped by SIGTERM; everything is saved" in desk.log("run")
    assert "its nodes are taken for another job; starts again" in desk.log("run")
    assert_same_samples(desk, "run", straight, "straight")
    assert_same_state(desk, "run", straight, "straight")


def test_the_node_dies(desk: Desk, cluster: Cluster, straight: Desk) -> None:
    """The only node of a job loses its power: Slurm starts the job again on the other one."""
    number = desk.start("run", "checkpoint.every_steps=4")
    desk.wait_for_steps("run", 10)
    with cluster.held(number):
        died = str(starts(desk, "run")[0]["nodes"])
        cluster.kill_node(died)
    desk.wait_for_end("run")
    other = {"n1": "n2", "n2": "n1"}[died]
    assert [start["nodes"] for start in starts(desk, "run")] == [died, other]
    assert int(str(starts(desk, "run")[1]["step"])) >= 8  # nothing lost beyond the last checkpoint
    assert desk.number("run") == number
    assert_same_samples(desk, "run", straight, "straight")
    assert_same_state(desk, "run", straight, "straight")


def test_one_of_two_nodes_dies(desk: Desk, cluster: Cluster, straight: Desk) -> None:
    """The processes on the other node end too, and the job goes on when the node is back."""
    number = desk.start("run", "--nodes", "2", "checkpoint.every_steps=4")
    desk.wait_for_steps("run", 10)
    with cluster.held(number):
        cluster.kill_node("n2")
    cluster.wait_for("n2 to be missed", lambda: cluster.node_state("n2").startswith("DOWN"))
    cluster.start_node("n2")
    desk.wait_for_end("run")
    assert len(starts(desk, "run")) > 1
    assert int(str(starts(desk, "run")[-1]["step"])) >= 8
    assert_same_samples(desk, "run", straight, "straight")


def test_no_progress(desk: Desk, cluster: Cluster) -> None:
    """A run that dies before it has saved anything is started again a set number of times, and then no more."""
    desk.site(restarts=1, setup=["ulimit -t 2"])  # seconds of CPU: enough to begin, not to train
    number = desk.start("run")

    desk.wait_for_failure("run")
    assert int(cluster.job(number)["Restarts"]) == 1
    assert len(starts(desk, "run")) == 2
    assert "started 2 times in a row without getting further than step 0" in desk.log("run")
    assert "started 2 times" in desk.submit("status", "run")


def test_a_mistake_is_not_tried_again(desk: Desk, cluster: Cluster) -> None:
    """What only the user can mend ends the job at once."""
    number = desk.start("run", "model.weights=absent.safetensors", "--nodes", "2")
    desk.wait_for_failure("run")
    assert cluster.job(number)["Restarts"] == "0"
    assert "stopped by a mistake that only you can mend" in desk.log("run")
    assert "absent.safetensors" in desk.submit("status", "run")
