"""Runs on a real cluster of two nodes: submitted, looked at, cancelled, in arrays, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Cluster, Desk

pytestmark = pytest.mark.slurm


def test_one_node(straight: Desk) -> None:
    """Submitted, trained, finished; the run's folder has it all, and status and logs find it there."""
    run = straight.folder / "straight"
    assert straight.metrics("straight")["steps"] == 36
    assert (run / "model.safetensors").is_file()
    shown = straight.submit("status", ".")
    for word in ("straight", straight.number("straight"), "finished", "step 36", "top-1"):
        assert word in shown
    log = straight.submit("logs", "straight")
    assert "begins" in log
    assert "epoch   3/3" in log
    assert "vit_efficient: finished" in log
    followed = straight.submit("logs", "-f", "straight")  # the job has ended: shown, and no waiting
    assert followed == log
    assert "ended already" in straight.submit("cancel", "straight")


def test_two_nodes(desk: Desk, assert_same_curve: Callable[..., None]) -> None:
    """A process on each node, over gloo: the global batches of one process, and its curves to float tolerance."""
    each = ("--recipe", "fp32_sdpa", "run.log_every=1")  # int8 would add codes that round to the other side
    desk.start("two", "--nodes", "2", *each)
    desk.start("one", *each)
    desk.wait_for_end("two", "one")
    attempts = [json.loads(line) for line in (desk.folder / "two/slurm/attempts").read_text().splitlines()]
    assert [attempt["nodes"] for attempt in attempts] == ["n[1-2]"]
    rows = desk.audit("two")
    assert {rank for _, _, rank, _ in rows} == {0, 1}
    assert sorted((e, s, k) for e, s, _, k in rows) == sorted((e, s, k) for e, s, _, k in desk.audit("one"))
    two, one = ([epoch["loss"] for epoch in desk.metrics(run)["history"]] for run in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-4)
    assert_same_curve(desk.folder / "two", desk.folder / "one", rel=1e-4, steps=36)


def test_cancel(desk: Desk, cluster: Cluster) -> None:
    """A cancelled run has saved, is not started again, and goes on when somebody wants it to."""
    number = desk.start("run", "optim.epochs=200")
    desk.wait_for_steps("run", 3)
    assert "running" in desk.submit("status", "run")
    assert f"job {number} is cancelled" in desk.submit("cancel", "run")
    cluster.wait_for("the end of the job", lambda: not cluster.run("squeue", "-h").strip())
    assert cluster.job(number)["JobState"] == "CANCELLED"
    assert cluster.job(number)["Restarts"] == "0"
    assert "Stopped by SIGTERM; everything is saved" in desk.log("run")
    kept = (desk.folder / "run/checkpoints").glob("step-*.ckpt")  # an epoch's end may be among them
    saved = max(int(path.stem.removeprefix("step-")) for path in kept)
    assert saved == desk.steps("run") > 0
    shown = desk.submit("status", "run")
    assert "cancelled" in shown
    assert f"step {saved}" in shown
    cluster.run("sbatch", str(desk.folder / "run/slurm/job.sh"))
    cluster.wait_for("its next start", lambda: desk.number("run") != number)  # status and cancel find the new job
    desk.wait_for_steps("run", saved + 1)
    assert f"run goes on from step {saved}" in desk.log("run")
    desk.submit("cancel", "run")


def test_cancel_before_it_begins(desk: Desk, cluster: Cluster) -> None:
    desk.site(sbatch=["--begin=now+1hour"])
    number = desk.start("run")
    assert "pending" in desk.submit("status", ".")
    assert "it had not begun" in desk.submit("cancel", "run")
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_array(desk: Desk, straight: Desk) -> None:
    """Several recipes as one array, each in its own folder under the study's; the same as one by one."""
    words = ("--array", "recipes", "--recipe", "fp32_sdpa", "--recipe", "int8_sdpa")
    desk.start_array("study", *words)
    desk.wait_for_end("study/fp32_sdpa", "study/int8_sdpa")
    numbers = [desk.number(f"study/{name}") for name in ("fp32_sdpa", "int8_sdpa")]
    job = numbers[0].partition("_")[0]
    assert numbers == [f"{job}_0", f"{job}_1"]
    for key in ("top1", "loss"):
        assert desk.metrics("study/int8_sdpa")[key] == straight.metrics("straight")[key]
    shown = desk.submit("status", "study")
    assert shown.count("finished") == 2
    assert "begins" in desk.submit("logs", "study/fp32_sdpa")
    assert "holds several runs" in desk.submit("logs", "study", code=2)


def test_never_to_begin(desk: Desk, cluster: Cluster) -> None:
    """Slurm takes a job that asks for more cores than a node has, and lets it wait for ever: status says so."""
    desk.site(cpus_per_task=8)
    number = desk.start("run")
    cluster.wait_for("a reason", lambda: cluster.job(number)["Reason"] == "PartitionConfig")
    assert "waits for ever: no node here has that many" in " ".join(desk.submit("status", "run").split())


@pytest.mark.parametrize(
    ("site", "words", "said", "advice"),
    [
        ({"partition": "nope"}, (), "invalid partition specified: nope", "The partitions here:\n    cpu*"),
        ({"gpu_type": "a100"}, ("--gpus-per-node", "2"), "node configuration is not available", "gpu:h200:2"),
        ({}, ("--gpus-per-node", "4"), "node configuration is not available", "--gpus-per-node"),
    ],
    ids=["partition", "gpu_type", "gpus"],
)
def test_refused(desk: Desk, site: dict[str, str], words: tuple[str, ...], said: str, advice: str) -> None:
    """Slurm's own words, what there is instead, and nothing left behind."""
    desk.site(cpus_per_task=1, **site)
    printed = desk.submit("--recipe", "int8_sdpa", "--time", "1h", "run.dir=run", *words, code=2)
    assert "Slurm refused the job. sbatch says:" in printed
    assert said in printed
    assert advice in printed
    assert not (desk.folder / "run").exists()
