"""The same recipe under torchrun: a machine with several devices and no Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from vit_efficient.recipe.load import dump_recipe, load_recipe

pytestmark = pytest.mark.slow
Torchrun = Callable[..., subprocess.Popen[str]]


def heed_interrupts() -> None:
    """As in a terminal: what a shell starts in the background is born to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def torchrun(tmp_path: Path, cache: Path) -> Iterator[Torchrun]:
    """Starts `torchrun --nproc-per-node 2 -m vit_efficient.fit ...`; what still runs afterwards is killed."""
    running: list[subprocess.Popen[str]] = []
    environment = {**os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}

    def begin(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        process = subprocess.Popen(
            [*command, "-m", "vit_efficient.fit", *words], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed_interrupts,
        )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def steps_of(audit: Path) -> list[tuple[str, str, str]]:
    return sorted((e, s, k) for e, s, _, k in (line.split() for line in audit.read_text().splitlines()))


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT], ids=["SIGTERM", "SIGINT"]
)
def test_two_processes_are_one_run(
    torchrun: Torchrun,
    command: Callable[..., str],
    small: Sequence[str],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """`strategy` follows from what torchrun started. Stopped by a signal to torchrun, both save; then on to the end."""
    longer = ("optim.epochs=6" if word == "optim.epochs=3" else word for word in small)  # not over before the signal
    plain = ("--recipe", "fp32_sdpa", *longer, "strategy.accelerator=cpu", "data.workers=1")
    command("fit", *plain, "run.dir=one", "data.audit=one.txt")
    process = torchrun(*plain, "run.dir=two", "data.audit=two.txt")
    audit = tmp_path / "two.txt"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if audit.exists() and len(audit.read_text().splitlines()) > 500:
            break
        time.sleep(0.02)
    process.send_signal(number)  # torchrun passes it on
    printed, _ = process.communicate(timeout=200)
    assert f"Stopped by {number.name}; everything is saved" in printed
    assert "1 node x 2 devices" in printed or "strategy.name = ddp: 2 devices" in printed
    again = torchrun("--resume", "two")
    printed, _ = again.communicate(timeout=200)
    assert again.returncode == 0, printed
    assert steps_of(tmp_path / "one.txt") == steps_of(audit)  # each sample once, none twice
    ranks = {line.split()[2] for line in audit.read_text().splitlines()}
    assert ranks == {"0", "1"}
    one, two = (json.loads((tmp_path / f / "metrics.json").read_text()) for f in ("one", "two"))
    assert [h["loss"] for h in two["history"]] == pytest.approx([h["loss"] for h in one["history"]], rel=1e-4)


def cut(source: Path, step: int, out: Path) -> None:
    """A copy of a run as it was after a step."""
    (out / "checkpoints").mkdir(parents=True)
    for file in ("recipe.yaml", f"checkpoints/step-{step:08d}.ckpt"):
        shutil.copy(source / file, out / file)


def test_one_goes_on_as_two_and_two_as_one(
    torchrun: Torchrun, command: Callable[..., str], small: Sequence[str], tmp_path: Path
) -> None:
    """Without a word about strategy or micro-batch: what the run's recipe holds of its first machine gives way."""
    often = ("checkpoint.every_steps=5", "checkpoint.keep=9")
    plain = ("--recipe", "fp32_sdpa", *small, "strategy.accelerator=cpu", "data.workers=0")
    command("fit", *plain, *often, "run.dir=one")
    cut(tmp_path / "one", 17, tmp_path / "two")
    process = torchrun("--resume", "two")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert "strategy.name = ddp instead of single: torchrun starts 2 processes" in printed
    assert "strategy.micro_batch = 64 instead of 128: each of 2 devices has 64 images of a step" in printed
    # As if the two had begun it, with the checkpoint that they wrote.
    cut(tmp_path / "two", 29, tmp_path / "again")
    recipe = tmp_path / "again" / "recipe.yaml"
    of_two = ("strategy=ddp", "strategy.devices=2", "strategy.micro_batch=64", "strategy.accelerator=cpu")
    recipe.write_text(dump_recipe(load_recipe(str(recipe), of_two).recipe))
    command("fit", "--resume", "again", "strategy.devices=1")
    losses = [
        [epoch["loss"] for epoch in json.loads((tmp_path / run / "metrics.json").read_text())["history"]]
        for run in ("one", "two", "again")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[2] == pytest.approx(losses[0], rel=2e-3)


def test_without_a_name_there_is_one_folder(torchrun: Torchrun, small: Sequence[str], tmp_path: Path) -> None:
    process = torchrun("--recipe", "fp32_sdpa", *small, "strategy.accelerator=cpu", "data.workers=0")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.json").is_file()


def test_a_mismatch_is_refused(torchrun: Torchrun, small: Sequence[str]) -> None:
    process = torchrun(
        "--recipe", "fp32_sdpa", *small, "strategy.accelerator=cpu", "strategy=ddp", "strategy.devices=3"
    )
    printed, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "strategy.devices: is 3, and torchrun starts 1 node x 2 processes" in printed
