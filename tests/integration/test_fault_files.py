"""Damaged checkpoints, full disks, two jobs in one folder, clocks and host names: what lies on the disk is safe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from vit_efficient.engine.checkpoint import read_checkpoint
from vit_efficient.engine.integrity import damage

Start = Callable[..., subprocess.Popen[str]]
Command = Callable[..., str]
WORDS = ("--recipe", "fp32_sdpa", "data.workers=0", "checkpoint.every_steps=1")
TWO = ("strategy.devices=2", "strategy.accelerator=cpu")
SHARDED = ("strategy=fsdp", *TWO, "checkpoint.sharded=true")


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem.partition("-")[2]) for path in (run / "checkpoints").glob("step-*.ckpt"))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, in place: what has the same bytes under another name changes too."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unfinished(run: Path) -> None:
    """Make a finished run one that was killed before its last step's figures."""
    for name in ("metrics.json", "model.safetensors"):
        (run / name).unlink()


@pytest.fixture
def stopped(start_with: Start, small: Sequence[str], tmp_path: Path) -> Path:
    """A run that was killed in the middle of its 15th checkpoint."""
    process = start_with("crash:15", *WORDS, *small, "run.dir=run")
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, printed
    return tmp_path / "run"


def test_a_crash_in_the_middle_of_a_checkpoint(command: Command, stopped: Path) -> None:
    """What was there before is whole, what was begun is no checkpoint, and it is cleared away."""
    assert steps(stopped) == [13, 14]
    for path in (stopped / "checkpoints").glob("*.ckpt"):
        assert read_checkpoint(path)["vit_efficient"]["position"]
    (half,) = (stopped / "checkpoints").glob(".*.tmp")
    assert half.stat().st_size > 0
    printed = command("fit", "--resume", "run")
    assert "step-00000014.ckpt" in printed
    assert not half.exists()
    assert json.loads((stopped / "metrics.json").read_text())["steps"] == 36


@pytest.mark.parametrize("harm", [flip, truncate])
def test_a_damaged_checkpoint(command: Command, stopped: Path, harm: Callable[[Path], None]) -> None:
    """The run goes back to the one before, and says so; a checkpoint that was named is not replaced in silence."""
    newest = stopped / "checkpoints" / "step-00000014.ckpt"
    harm(newest)
    printed = command("fit", "--resume", "run/checkpoints/step-00000014.ckpt", code=2)
    assert "It is damaged" in printed
    printed = command("evaluate", *WORDS[:2], "--checkpoint", "run/checkpoints/last.ckpt", code=2)
    assert "It is damaged" in printed  # the same bytes
    printed = command("fit", "--resume", "run")
    assert f"{newest.relative_to(stopped.parent)} is damaged" in printed
    assert "going back to run/checkpoints/step-00000013.ckpt" in printed
    assert json.loads((stopped / "metrics.json").read_text())["steps"] == 36


@pytest.fixture(scope="module")
def finished_in_parts(tmp_path_factory: pytest.TempPathFactory, cache: Path, small: Sequence[str]) -> Path:
    """A run whose checkpoints are folders, of steps 34 and 36, to the end."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "vit_efficient.fit", *WORDS[:3], *small, *SHARDED, "checkpoint.every_steps=5"]
    done = subprocess.run(
        [*words, "run.dir=run"], cwd=folder, env=environment, text=True, capture_output=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


@pytest.fixture
def in_parts(finished_in_parts: Path, tmp_path: Path) -> Path:
    """The same, killed before its last figures."""
    shutil.copytree(finished_in_parts, tmp_path / "run", symlinks=True)
    unfinished(tmp_path / "run")
    return tmp_path / "run"


def flip_in_parts(folder: Path) -> None:
    """A bit of a number in some part: neither DCP nor torch looks."""
    flip(max(folder.glob("__1_*.distcp"), key=lambda part: part.stat().st_size))


def truncate_a_part(folder: Path) -> None:
    truncate(folder / "__1_0.distcp")


def lose_a_part(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm", [flip_in_parts, *(pytest.param(harm, marks=pytest.mark.long) for harm in (truncate_a_part, lose_a_part))]
)
def test_a_damaged_checkpoint_in_parts(command: Command, in_parts: Path, harm: Callable[[Path], None]) -> None:
    newest = in_parts / "checkpoints" / "step-00000036.ckpt"
    harm(newest)
    printed = command("fit", "--resume", "run/checkpoints/step-00000036.ckpt", code=2)
    assert "It is damaged" in printed
    printed = command("fit", "--resume", "run")
    assert "step-00000036.ckpt is damaged" in printed
    assert "going back to run/checkpoints/step-00000034.ckpt" in printed
    assert json.loads((in_parts / "metrics.json").read_text())["steps"] == 36
    assert damage(newest) is None  # written again


@pytest.mark.slow
def test_commands_that_read_a_damaged_checkpoint(command: Command, in_parts: Path) -> None:
    """They take the newest whole one of a run, and say so; what was named is refused."""
    flip_in_parts(in_parts / "checkpoints" / "step-00000036.ckpt")
    printed = command("export", "consolidate", "run", "--out", "weights.safetensors")
    assert "step-00000036.ckpt is damaged" in printed
    assert "step-00000034.ckpt, step 34" in printed
    printed = command("evaluate", "--checkpoint", "run", "strategy=single", "checkpoint.sharded=false")
    assert "step-00000036.ckpt is damaged" in printed
    for words in (("evaluate", "--checkpoint"), ("export", "consolidate", "--out", "w.safetensors")):
        printed = command(*words, "run/checkpoints/last.ckpt", code=2)
        assert "It is damaged" in printed


def test_all_checkpoints_damaged(command: Command, small: Sequence[str], stopped: Path) -> None:
    for path in (stopped / "checkpoints").glob("step-*.ckpt"):
        truncate(path)
    (stopped / "checkpoints" / "best.ckpt").unlink()  # of the first epoch's end, and so a way out
    printed = command("fit", *WORDS, *small, "run.dir=run", "--resume", "auto", code=2)
    assert "Every checkpoint of this run is damaged" in printed
    assert "step-00000013.ckpt" in printed


@pytest.mark.slow
def test_the_best_checkpoint_is_the_last_resort(command: Command, small: Sequence[str], stopped: Path) -> None:
    for path in (stopped / "checkpoints").glob("step-*.ckpt"):
        truncate(path)
    printed = command("fit", *WORDS, *small, "run.dir=run", "--resume", "auto")
    assert "going back to run/checkpoints/best.ckpt" in printed
    assert json.loads((stopped / "metrics.json").read_text())["steps"] == 36


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [(), pytest.param(("strategy=ddp", *TWO), marks=pytest.mark.long), SHARDED],
    ids=["alone", "ddp", "sharded"],
)
def test_a_disk_that_fills_up(
    start: Start, command: Command, small: Sequence[str], small_disk: Path, tmp_path: Path, strategy: tuple[str, ...]
) -> None:
    """The run ends with a message; with space again it goes on from the last checkpoint, which is whole."""
    run = small_disk / "run"
    process = start("fit", *WORDS, *small, *strategy, f"run.dir={run}", "data.audit=a.txt")
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline and not [s for s in steps(run) if s >= 3]:
        time.sleep(0.05)
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 2, printed
    assert "Cannot write the checkpoint" in printed
    assert "bytes free" in printed
    assert "No space left on device" in printed or (strategy != SHARDED and "a full disk" in printed)
    assert "Traceback" not in printed, printed
    newest = run / "checkpoints" / f"step-{steps(run)[-1]:08d}.ckpt"
    read_checkpoint(newest)
    assert not [*(run / "checkpoints").glob(".*.tmp")]
    (small_disk / "ballast").unlink()
    printed = command("fit", "--resume", str(run))
    assert newest.name in printed
    assert json.loads((run / "metrics.json").read_text())["steps"] == 36


@pytest.mark.slow
def test_a_disk_that_is_full_of_something_else(
    start: Start, small: Sequence[str], small_disk: Path, tmp_path: Path
) -> None:
    """Between two checkpoints it is TensorBoard that meets it: said once, and the run trains on to its next one."""
    run = small_disk / "run"
    shorter = [word for word in small if not word.startswith("data.batch_size")]  # 45 steps an epoch
    words = ("--recipe", "fp32_sdpa", *shorter, "data.batch_size=32", f"run.dir={run}", "data.audit=a.txt")
    process = start("fit", *words, "run.log_every=1")
    deadline = time.monotonic() + 240
    audit = tmp_path / "a.txt"
    while process.poll() is None and time.monotonic() < deadline and not (audit.exists() and audit.stat().st_size):
        time.sleep(0.02)
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 2, printed
    assert printed.count("TensorBoard's files cannot be written any more") == 1, printed
    assert "Cannot write the checkpoint" in printed
    assert "Traceback" not in printed, printed


def test_two_jobs_in_one_folder(start: Start, command: Command, small: Sequence[str], tmp_path: Path) -> None:
    """The second refuses and names the first; after `kill -9` of the first nothing is left to clear away."""
    words = (*WORDS, *(w for w in small if w != "optim.epochs=3"), "optim.epochs=5000", "run.dir=run")
    first = start("fit", *words)
    run = tmp_path / "run"
    deadline = time.monotonic() + 240
    while first.poll() is None and time.monotonic() < deadline and not steps(run):
        time.sleep(0.05)
    for second in (("--resume", "run"), (*words, "--resume", "auto")):
        printed = command("fit", *second, code=2)
        assert f"Another job is at work in run: pid {first.pid} on {os.uname().nodename}, since 20" in printed
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    at = steps(run)[-1]
    third = start("fit", "--resume", "run")
    deadline = time.monotonic() + 240
    while third.poll() is None and time.monotonic() < deadline and steps(run)[-1] <= at:
        time.sleep(0.05)
    assert third.poll() is None
    assert steps(run)[-1] > at


def test_another_clock_and_another_host(
    launch: Start, start_with: Start, command: Command, small: Sequence[str], tmp_path: Path
) -> None:
    """A run whose clock jumps back a day a step, killed, goes on under another host name, to the same bits."""
    words = (*WORDS, *small)
    command("fit", *words, "run.dir=straight")
    process = start_with("clock:-86400+kill:15", *words, "run.dir=run", "data.audit=a.txt", "--resume", "auto")
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL, printed
    run = tmp_path / "run"
    assert steps(run)[-1] >= 14
    lock = json.loads((run / ".lock").read_text())
    assert lock["host"] == os.uname().nodename
    inner = "import socket, sys; socket.sethostname('elsewhere'); from vit_efficient import cli, fit; " \
        "cli.run_command(lambda: fit.main(sys.argv[1:]))"  # fmt: skip
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("cannot have a host name of its own here")
    code = f"import os, sys; os.execvp('unshare', ['unshare', '--uts', {sys.executable!r}, '-c', {inner!r}, " \
        "*sys.argv[1:]])"  # fmt: skip
    again = launch("-c", code, *words, "run.dir=run", "--resume", "auto")
    printed, _ = again.communicate(timeout=300)
    assert again.returncode == 0, printed
    assert json.loads((run / ".lock").read_text())["host"] == "elsewhere"
    one, two = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("straight", "run"))
    assert all((one["state_dict"][name] == value).all() for name, value in two["state_dict"].items())
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 < metrics["train_seconds"] < 3600


def test_later_checkpoints_than_the_one_resumed(
    command: Command, small: Sequence[str], tmp_path: Path, stopped: Path
) -> None:
    """Going back to an earlier checkpoint by name keeps what is written from there."""
    shutil.copy(stopped / "checkpoints" / "step-00000014.ckpt", stopped / "checkpoints" / "step-00000099.ckpt")
    command("fit", "--resume", "run/checkpoints/step-00000013.ckpt")
    assert steps(stopped) == [35, 36, 99]
