"""`fit` and `evaluate` as a user runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Command = Callable[..., str]

KEYS = {
    "top1", "top5", "f1", "loss", "epochs", "steps", "images_per_second", "seconds", "peak_memory_bytes", "parameters",
    "weight_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, small: Sequence[str]) -> Path:
    """A finished small int8 run, made once for the tests that look at one."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["--recipe", "int8_sdpa", *small, "run.dir=run", "--output", "out.json"]
    environment = {**os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "vit_efficient.fit", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout)
    return folder


def test_a_run_leaves_everything(finished: Path) -> None:
    run = finished / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics.keys() >= KEYS
    assert metrics["epochs"] == 3
    assert metrics["steps"] == 36
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 1
    assert metrics["weight_bytes"] == (run / "model.safetensors").stat().st_size
    steps = {"step-00000024.ckpt", "step-00000036.ckpt"}
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt", *steps}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((finished / "out.json").read_text())["top1"] == metrics["top1"]
    printed = (finished / "printed").read_text()
    for row in ("top-1", "top-5", "macro F1", "size on disk", "of fp32", "time", "images/s"):
        assert row in printed


def test_tensorboard_shows_the_run(finished: Path) -> None:
    events = EventAccumulator(str(finished / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "train/loss", "train/learning_rate", "train/gradient_norm", "speed/images_per_second", "speed/data_wait_share",
        "memory/peak_bytes", "evaluation/top1", "evaluation/top5", "evaluation/f1", "evaluation/loss",
    }  # fmt: skip
    assert len(events.Scalars("evaluation/top1")) == 3
    images = set(events.Tags()["images"])
    assert any(name.startswith("examples/train") for name in images)
    assert "evaluation/confusion" in images


def test_the_shipped_file_is_what_was_reported(finished: Path, command: Command, tmp_path: Path) -> None:
    metrics = json.loads((finished / "run" / "metrics.json").read_text())
    command("evaluate", "--checkpoint", str(finished / "run"), "--output", "e.json")
    again = json.loads((tmp_path / "e.json").read_text())
    assert (again["top1"], again["loss"], again["weight_bytes"]) == (
        metrics["top1"], metrics["loss"], metrics["weight_bytes"],
    )  # fmt: skip
    command("evaluate", "--recipe", "int8_sdpa", "--checkpoint", str(finished / "run" / "checkpoints" / "last.ckpt"),
            "model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}", "--output", "c.json")  # fmt: skip
    from_checkpoint = json.loads((tmp_path / "c.json").read_text())
    assert from_checkpoint["top1"] == metrics["top1"]  # training form, finalized now: the same integers
    assert from_checkpoint["loss"] == pytest.approx(metrics["loss"], rel=1e-6)


def test_the_resolved_recipe_reproduces_the_run(finished: Path, command: Command, tmp_path: Path) -> None:
    command("fit", "--recipe", str(finished / "run" / "recipe.yaml"), "run.dir=again")
    a, b = (json.loads((p / "metrics.json").read_text()) for p in (finished / "run", tmp_path / "again"))
    assert (a["top1"], a["loss"], a["history"]) == (b["top1"], b["loss"], b["history"])


def test_a_finished_run_is_not_run_again(finished: Path, command: Command) -> None:
    printed = command("fit", "--resume", str(finished / "run"))
    assert "finished already" in printed
    assert "another recipe" not in printed
    printed = command("fit", "--resume", str(finished / "run" / "checkpoints" / "last.ckpt"), "optim.lr=1")
    assert "finished already" in printed
    assert "another recipe than this command asks for, which was not trained" in printed
    assert "optim.lr: " in printed
    assert ", 1.0 now" in printed


def test_existing_run_is_not_overwritten(finished: Path, command: Command) -> None:
    before = (finished / "run" / "metrics.json").read_bytes()
    printed = command("fit", "--recipe", "int8_sdpa", f"run.dir={finished / 'run'}", code=2)
    assert "already exists" in printed
    assert "--resume" in printed
    assert (finished / "run" / "metrics.json").read_bytes() == before


def test_checkpoint_of_another_recipe(finished: Path, command: Command, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished / "run", copy)
    (copy / "metrics.json").unlink()
    printed = command("fit", "--recipe", "fp32_sdpa", "--resume", str(copy), code=2)
    assert "another recipe" in printed
    assert "quantization.name: 'int8' in the checkpoint, 'none' now" in printed
    printed = command(
        "evaluate", "--recipe", "fp32_sdpa", "--checkpoint", str(copy / "checkpoints" / "last.ckpt"), code=2
    )
    assert "another recipe" in printed


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_hostile_files_do_not_run(finished: Path, command: Command, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    torch.save({"state_dict": Hostile(trap), "vit_efficient": 1}, tmp_path / "evil.pth")
    printed = command("fit", "--recipe", "fp32_sdpa", f"model.weights={tmp_path / 'evil.pth'}", code=2)
    assert "evil.pth" in printed
    copy = tmp_path / "copy"
    shutil.copytree(finished / "run", copy)
    (copy / "metrics.json").unlink()
    torch.save({"vit_efficient": Hostile(trap)}, copy / "checkpoints" / "step-00000099.ckpt")
    assert "never run" in command("fit", "--resume", str(copy), code=2)
    assert not trap.exists()


def test_mistakes_are_reported_at_once(command: Command) -> None:
    printed = command("fit", "--recipe", "int8_sdpa", "optim.lrr=1", "data.batch_size=many", "attention=flsh2", code=2)
    for text in ("optim.lrr", "data.batch_size", "flash2", "lr"):
        assert text in printed
    assert "3 mistakes" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_flash2_without_a_gpu(command: Command) -> None:
    printed = command("fit", "--recipe", "int8_flash2", code=2)
    assert "flash2" in printed
    assert "attention=sdpa" in printed


def test_no_shards(command: Command, tmp_path: Path) -> None:
    assert "vit_efficient.prepare cifar10" in command("fit", "--recipe", "int8_sdpa", "protocol=cifar10", code=2)
    (tmp_path / "empty").mkdir()
    printed = command("fit", "--recipe", "int8_sdpa", "protocol=cifar10", "data.shards=empty", code=2)
    assert "empty" in printed


def test_dry_run_says_what_it_comes_to(command: Command) -> None:
    printed = command("fit", "--recipe", "int8_sdpa", "--dry-run")
    for text in ("resolved: 1", "2,712,010", "2,654,208", "estimated GPU memory", "This machine can run it"):
        assert text in printed
    printed = command("fit", "--recipe", "int4_flash2", "protocol=imagenet_vit_l16", "model.num_classes=1000",
                      "model.kwargs={depth: 1}", "model.weights=null", "--dry-run")  # fmt: skip
    assert "cannot run it" in printed
    assert "data.shards" in printed


def test_a_loss_that_is_not_a_number_stops_the_run(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    printed = command("fit", "--recipe", "fp32_sdpa", *small, "optim.lr=1e38", "optim.clip=null", "run.dir=nan", code=2)
    assert "The loss became" in printed
    assert "samples: " in printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_leaves_the_previous_checkpoint(command: Command, small: Sequence[str], small_disk: Path) -> None:
    # A checkpoint is 1.1 MB: two are kept while one is written, so the third does not fit beside a ballast.
    words = ("--recipe", "fp32_sdpa", *small, f"run.dir={small_disk / 'run'}", "checkpoint.keep=9")
    printed = command("fit", *words, code=2)
    assert "Cannot write the checkpoint" in printed
    assert "No space left" in printed or "space" in printed
    kept = sorted((small_disk / "run" / "checkpoints").glob("step-*.ckpt"))
    assert kept
    from vit_efficient.engine.checkpoint import read_checkpoint

    for path in kept:
        read_checkpoint(path)
    assert not [*(small_disk / "run" / "checkpoints").glob("*.tmp")]
    assert not [*(small_disk / "run" / "checkpoints").glob(".*.tmp")]
