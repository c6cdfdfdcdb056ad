"""Processes that die, fail or hang in the middle of a run: the others end, and say who it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vit_efficient.cli import PEER_LOST, STALLED

Start = Callable[..., subprocess.Popen[str]]
Command = Callable[..., str]
DDP = ("strategy=ddp", "strategy.devices=2", "strategy.accelerator=cpu", "data.workers=0")
LONG = "optim.epochs=300"
WITHIN = 60  # seconds, by the issue that asked for it


def shortened(small: Sequence[str], *words: str) -> tuple[str, ...]:
    """`small`, without what ``words`` say anew."""
    keys = {word.partition("=")[0] for word in words}
    return (*(word for word in small if word.partition("=")[0] not in keys), *words)


def wait_for_samples(process: subprocess.Popen[str], audit: Path, count: int) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if audit.exists() and len(audit.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"the run never came to {count} samples: {process.communicate()[0]}")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + WITHIN
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if alive(pid)]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(start: Start, command: Command, small: Sequence[str], tmp_path: Path, victim: int) -> None:
    """`kill -9` of either rank ends both within a minute, by name; the run goes on from its last checkpoint."""
    words = shortened(small, "optim.epochs=8", "checkpoint.every_steps=5", "data.audit=a.txt")
    process = start("fit", "--recipe", "fp32_sdpa", *words, *DDP, "run.dir=run")
    wait_for_samples(process, tmp_path / "a.txt", 2500)
    (child,) = children(process.pid)
    dead, left = (process.pid, child) if victim == 0 else (child, process.pid)
    os.kill(dead, signal.SIGKILL)
    wait_until_gone([left])
    printed, _ = process.communicate(timeout=30)
    assert re.search(rf"rank {victim} \(pid {dead} on \S+\) has died", printed), printed
    assert process.returncode == (PEER_LOST if victim == 1 else -signal.SIGKILL), printed
    if victim == 1:  # of the dead one's stacks there can be none
        assert "in fit" in (tmp_path / "run" / "stacks" / "rank-00000.txt").read_text()
        command("fit", "--resume", "run")
        lines = (line.split() for line in (tmp_path / "a.txt").read_text().splitlines())
        seen = [(epoch, step, key) for epoch, step, _, key in lines]
        assert len(set(seen)) == 8 * 1437
        assert len(seen) <= 8 * 1437 + 6 * 128  # run again: what was done since the last checkpoint


@pytest.mark.slow
def test_a_rank_that_no_launcher_watches(launch: Start, free_port: int, small: Sequence[str], tmp_path: Path) -> None:
    """Ranks of two launchers, as on two nodes: only silence tells of a death, and it does, within a minute."""
    words = shortened(small, LONG, "data.audit=a.txt")
    ranks = [
        launch(
            "-c", f"import os; os.environ.update(RANK='{rank}', LOCAL_RANK='{rank}', WORLD_SIZE='2', LOCAL_WORLD_SIZE="
            f"'2', GROUP_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='{free_port}', TORCHELASTIC_RUN_ID='x')\n"
            "from vit_efficient import cli, fit; cli.run_command(fit.main)",
            "--recipe", "fp32_sdpa", *words, *DDP, "run.dir=run", "run.lost_after=8",
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_for_samples(ranks[1], tmp_path / "a.txt", 2500)
    os.kill(ranks[1].pid, signal.SIGSTOP)  # neither a broken connection nor an exit code: silence, as of a lost node
    printed, _ = ranks[0].communicate(timeout=WITHIN)
    assert re.search(rf"rank 1 \(pid {ranks[1].pid} on \S+\) has died: not heard from for", printed), printed
    assert ranks[0].returncode == PEER_LOST


@pytest.mark.slow
def test_a_hang(start_with: Start, small: Sequence[str], tmp_path: Path) -> None:
    """All are alive and nothing happens: both ranks write down where they stand, and end."""
    process = start_with(
        "hang:1:14", "--recipe", "fp32_sdpa", *small, *DDP, "run.dir=run", "run.stalled_after=25",
    )  # fmt: skip
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == STALLED, printed
    assert "made no progress for" in printed
    stacks = {rank: (tmp_path / "run" / "stacks" / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)}
    assert "in hang" in stacks[1]
    assert "in hang" not in stacks[0]
    assert "last sign of progress here: the end of micro-batch 14, step 14" in stacks[1]


def test_a_hang_of_one_process(start_with: Start, small: Sequence[str], tmp_path: Path) -> None:
    words = ("--recipe", "fp32_sdpa", *small, "run.dir=run", "run.stalled_after=20", "data.workers=0")
    process = start_with("hang:0:3", *words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == STALLED, printed
    assert "in hang" in (tmp_path / "run" / "stacks" / "rank-00000.txt").read_text()


@pytest.mark.slow
def test_code_that_keeps_the_interpreter(start_with: Start, small: Sequence[str]) -> None:
    """No thread of Python can run then: a timer outside it writes the stacks to stderr."""
    words = ("--recipe", "fp32_sdpa", *small, "run.dir=run", "run.stalled_after=10", "data.workers=0")
    process = start_with("held:0:3", *words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 1, printed
    assert "in hold" in printed


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["error:1:14", pytest.param("error:0:14", marks=pytest.mark.long)])
def test_an_error_of_one_rank(start_with: Start, small: Sequence[str], fault: str) -> None:
    """The other ends with it, and both say what it was, without a traceback of a broken connection."""
    process = start_with(fault, "--recipe", "fp32_sdpa", *small, *DDP, "run.dir=run")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    assert re.search(rf"rank {fault[6]} \(pid \d+ on \S+\) failed. shard 3 cannot be read", printed), printed
    assert "Traceback" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_loss_of_one_rank_that_is_not_a_number(
    start_with: Start, small: Sequence[str], tmp_path: Path, accumulate: int
) -> None:
    words = (*small, *DDP, "run.dir=run", f"strategy.micro_batch={64 // accumulate}", "checkpoint.every_steps=1")
    process = start_with("nan:1:14", "--recipe", "fp32_sdpa", *words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    assert re.search(r"rank 1 .* failed. The loss became nan at step 15.\s+samples: \S+", printed), printed
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))
    assert kept == ["step-00000013.ckpt", "step-00000014.ckpt"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_that_are_not_finite_are_not_saved(
    start_with: Start, small: Sequence[str], tmp_path: Path, ranks: int
) -> None:
    """The loss of the step was finite, so that only a look at the weights tells."""
    words = (*small, "run.dir=run", "checkpoint.every_steps=1", "data.workers=0", *(DDP if ranks == 2 else ()))
    process = start_with("weights:0:4+broadcasts", "--recipe", "fp32_sdpa", *words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    assert "Step 5 made weights that are not finite: model." in printed
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*.ckpt"))
    assert kept == ["step-00000003.ckpt", "step-00000004.ckpt"]
    # Lightning's own would make the host wait for its GPU before every micro-batch.
    counts = [line.split() for line in (tmp_path / "broadcasts.txt").read_text().splitlines()]
    assert len(counts) >= 5 * ranks
    assert len({tuple(line) for line in counts}) == ranks, "none between the first step and the last"


@pytest.mark.parametrize(("place", "saved"), [("setup", False), ("end", True), ("evaluation", True)])
def test_a_signal_outside_training(
    start_with: Start, command: Command, small: Sequence[str], tmp_path: Path, place: str, saved: bool
) -> None:
    """Before the first step and after the last there is nothing to save; the run ends at once and goes on later."""
    words = ("--recipe", "fp32_sdpa", *shortened(small, "optim.epochs=1"), "run.dir=run", "--resume", "auto")
    process = start_with(f"term:{place}", *words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "Nothing had to be saved" in printed
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == saved
    command("fit", *words)
    assert (tmp_path / "run" / "metrics.json").exists()


def test_a_signal_that_python_drops(start_with: Start, small: Sequence[str], tmp_path: Path) -> None:
    """What its handler raises gets lost in a callback; training takes it up, and saves its first step."""
    words = (*shortened(small, "optim.epochs=50"), "run.dir=run")
    process = start_with("term:dropped", "--recipe", "fp32_sdpa", *words)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "Exception ignored in" in printed
    assert "Stopped by SIGTERM; everything is saved" in printed
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*.ckpt")] == ["step-00000001.ckpt"]
