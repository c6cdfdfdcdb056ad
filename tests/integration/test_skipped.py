"""Samples that cannot be read, left out of real runs: counted over epochs, evaluations, ranks and resumptions."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_efficient.data.cache import ensure_digits
from vit_efficient.data.manifest import read_manifest
from vit_efficient.data.shards import read_index

# two training samples in each of three epochs; one of the evaluation's after each epoch, and once more at the end
TIMES = 2 * 3 + 1 * 4


@pytest.fixture
def damaged(cache: Path, tmp_path: Path) -> Path:
    """Digits with a byte changed in two samples to train on, and in one to evaluate on."""
    folder = tmp_path / "digits"
    shutil.copytree(ensure_digits(cache), folder)
    for split, numbers in (("train", (3, 700)), ("val", (5,))):
        path = folder / split / read_manifest(folder / split).shards[0].file
        index = read_index(path, read_manifest(folder / split).shards[0].samples)
        data = bytearray(path.read_bytes())
        for number in numbers:
            data[int(index["offset"][number] + index["length"][number]) - 600] ^= 1
        path.write_bytes(data)
    return folder


@pytest.fixture
def words(damaged: Path, small: Sequence[str]) -> tuple[str, ...]:
    return ("--recipe", "fp32_sdpa", *small, f"data.shards={damaged}", "run.dir=run", "run.log_every=4")


def test_what_is_left_out_is_counted_and_named(
    command: Callable[..., str], words: tuple[str, ...], tmp_path: Path
) -> None:
    printed = command("fit", *words, code=2)
    assert "checksum differs" in printed  # without being told to, it goes no further
    shutil.rmtree(tmp_path / "run")
    printed = command("fit", *words, "data.on_error=skip")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["skipped_samples"] == TIMES
    assert metrics["samples"] == 359
    assert printed.count("left out: ") == TIMES
    assert f"{TIMES} times in all epochs" in printed
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("data/skipped_samples")][-1] == TIMES - 2  # the last two follow
    shutil.rmtree(tmp_path / "run")
    printed = command("fit", *words, "data.on_error=skip", "data.max_skipped=0.001", code=2)
    assert "2 samples of one epoch had to be left out, more than data.max_skipped allows" in printed


@pytest.mark.slow
def test_the_count_is_of_all_ranks_and_survives_a_stop(
    start_with: Callable[..., subprocess.Popen[str]],
    signal_stopped: Callable[[subprocess.Popen[str], signal.Signals], None],
    command: Callable[..., str],
    words: tuple[str, ...],
    tmp_path: Path,
) -> None:
    skip = (*words, "data.on_error=skip", "data.audit=a.txt")
    two = ("strategy=ddp", "strategy.devices=2", "strategy.accelerator=cpu", "data.workers=0")
    process = start_with("stop:19", *skip, *two)  # in the second epoch
    signal_stopped(process, signal.SIGTERM)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM, printed
    command("fit", "--resume", "run", *two)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["skipped_samples"] == TIMES
