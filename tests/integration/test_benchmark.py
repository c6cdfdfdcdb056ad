"""`python -m vit_efficient.benchmark`, of models and of data, as a person runs it."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vit_efficient.data.resolve import open_shards
from vit_efficient.measure.data import read_images
from vit_efficient.measure.decoding import OURS, USUAL, compare_decoding

Command = Callable[..., str]


@pytest.fixture
def photographs(command: Command, shared: Callable[[str], Path], tmp_path: Path) -> Path:
    """The 1,000 real images, as shards."""
    archive = shared("data/ILSVRC2012_sample_train.tar")
    command("prepare", "imagenet", "--train", str(archive), "--out", "in1k", "--shard-size", "100")
    return tmp_path / "in1k"


def test_all_tables(command: Command, photographs: Path, tmp_path: Path) -> None:
    words = ("--images", "20", "--repetitions", "2", "--workers", "1", "2", "--seconds", "0.5")
    printed = command("benchmark", "data", str(photographs), *words, "--output", "figures.json")
    for said in ("One core: 20 images", "against the usual", "The loader", "1,000,000,000 samples", "perfect shuffle"):
        assert said in printed, printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {len(rates) for rates in figures["decoding"]["rates"].values()} == {2}
    assert all(rate > 0 for rates in figures["decoding"]["rates"].values() for rate in rates)
    assert [load["workers"] for load in figures["loader"]] == [1, 2]
    assert all(load["rate"] > 0 and load["images"] > 0 for load in figures["loader"])
    assert figures["plan"]["samples"] == 10**9
    assert figures["environment"]["commit"] is None or figures["environment"]["packages"]["torch"]


def test_without_shards_there_is_the_plan(command: Command) -> None:
    printed = command("benchmark", "data")
    assert "go to any step" in printed
    assert "One core" not in printed


def test_models_in_one_table(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    mine = ("--recipe", "int8_sdpa attention.kernel=math", "--recipe", "fp32_sdpa", small[0])
    timed = ("--batch", "1,8", "--rounds", "2", "--seconds", "0.05", "--output", "figures.json")
    printed = command("benchmark", *mine, *timed, "strategy.accelerator=cpu")
    assert "batch 8" in printed
    assert "times as fast as int8_sdpa attention.kernel=math (eager)" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["int8_sdpa attention.kernel=math", "fp32_sdpa"] * 2
    assert all(row["images_per_second"] > 0 and row["calls"] >= 6 for row in figures["rows"])
    assert figures["environment"]["packages"]["torch"]
    assert figures["attention_kernels"] == {}, "on a CPU PyTorch chooses"


def test_one_that_fails_leaves_the_others_and_an_exit_code(
    command: Command, small: Sequence[str], tmp_path: Path
) -> None:
    mine = ("--recipe", "int4_sdpa quantization.lora=null", "--recipe", "fp32_sdpa", small[0], "--train")
    timed = ("--batch", "2", "--rounds", "1", "--seconds", "0.05", "--output", "figures.json")
    printed = " ".join(command("benchmark", *mine, *timed, "strategy.accelerator=cpu", code=2).split())
    assert "1 of 2 could not be measured. The other figures stand." in printed
    assert printed.count("leaves nothing to train") >= 2, "where it happened, and at the end"
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert rows[0]["failed"].startswith("UserError: int4_sdpa quantization.lora=null leaves nothing to train")
    assert rows[1]["failed"] is None
    assert rows[1]["speedup"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data", "absent"), "there is no such folder"),
        (("data", "--images", "0"), "0 is not above 0"),
        (("data", "--seconds", "0"), "--seconds 0 is not above 0"),
        (("dta",), "nothing to measure"),
        (("training",), "required: --recipe"),
        (("training", "--recipe", " "), "nothing to measure"),
        (("training", "--recipe", "fp32_sdpa", "--steps", "0"), "0 is not above 0"),
        (("--recipe", "fp32_sdpa", "--batch", "1,0"), "0 is not above 0"),
        (("--recipe", "fp32_sdpa", "--how", "eager,fast"), "'fast' is none of eager, compiled"),
        (("--recipe", "fp32_sdpa", "--how", "graph", "strategy.accelerator=cpu"), "graph is for CUDA devices"),
        (("--recipe", "fp32_sdpa", "--train", "--peers"), "leave out --how, --checkpoint and --peers"),
        (("--recipe", "fp32_sdpa", "--compile-mode", "max-autotune"), "none of these is. Add `--how compiled`"),
        (("--recipe", "fp32_sdpa", "--how", "compiled", "--compile-mode", "best"), "torch.compile has default"),
        (("--recipe", "fp33_sdpa"), "did you mean 'fp32_sdpa'"),
    ],
)
def test_mistakes_are_explained(command: Command, words: tuple[str, ...], said: str) -> None:
    assert said in " ".join(command("benchmark", *words, code=2).split())


@pytest.mark.slow
@pytest.mark.long  # not for its length: it compares speeds, which on a machine with other work is a matter of luck
def test_faster_than_the_usual_pipeline(photographs: Path) -> None:
    """1.7 times is the promise, on a quiet machine; a test machine may be busy, but both share its troubles."""
    images = read_images(open_shards(str(photographs), "SHARDS", "train"), 200)
    speeds = {speed.name: speed.median for speed in compare_decoding(images, 224, "bilinear", 3)}
    print({name: round(rate) for name, rate in speeds.items()})
    assert speeds[OURS] > 1.5 * speeds[USUAL]


def test_training_on_one_process_and_two(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    """Steps of `fit` itself, in processes of their own; two ranks of 8 images and one of 16 see losses fall."""
    rows = ("--recipe", "fp32_sdpa strategy=single", "--recipe", "int8_sdpa strategy=ddp strategy.devices=2")
    words = ("--batch", "8", "--steps", "6", "--warm-up", "20", "--rounds", "2", "--output", "figures.json")
    eager = ("strategy.accelerator=cpu", "optim.lr=0.01", "optim.warmup_epochs=0", "optim.label_smoothing=0")
    printed = command("benchmark", "training", *rows, small[0], *words, *eager)
    assert "run 2 of 2: int8_sdpa strategy=ddp strategy.devices=2, batch 8" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    one, two = figures["rows"]
    assert [one["world"], two["world"]] == [1, 2]
    assert [[len(seconds) for seconds in row["rounds"]] for row in (one, two)] == [[6, 6], [6, 6]]
    assert one["relative"] == 1
    ratios = [8 / own / (8 / other) for own, other in zip(two["medians"], one["medians"], strict=True)]
    assert two["relative"] == pytest.approx(statistics.median(ratios))
    assert two["images_per_second"] == 2 * two["images_per_second_each"]
    assert one["loss"] < 0.5, "the same 8 images every time: they are learned by heart"
    assert two["loss"] < 1.5
    assert one["peak"] is None, "a CPU's memory cannot be told apart"
    assert figures["environment"]["command"][:4] == ["python", "-m", "vit_efficient.benchmark", "training"]


def test_training_that_fails_leaves_the_others(command: Command, small: Sequence[str], tmp_path: Path) -> None:
    rows = ("--recipe", "int4_sdpa quantization.lora=null", "--recipe", "fp32_sdpa")
    words = ("--batch", "8", "--steps", "2", "--warm-up", "1", "--rounds", "1", "--output", "figures.json")
    printed = command(
        "benchmark", "training", *rows, small[0], *words, "strategy=single", "strategy.accelerator=cpu", code=2
    )
    assert "1 of 2 could not be measured. The other figures stand." in printed
    lost, ran = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert "leaves nothing to train" in lost["failed"]
    assert ran["relative"] == 1
    assert not list(tmp_path.glob("runs*")), "nothing is left behind but what was asked for"


def test_training_that_is_stopped_leaves_nothing(
    start: Callable[..., subprocess.Popen[str]], small: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process, no folder. The signal goes to the command alone, as that of a batch system may."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    words = ("--recipe", "fp32_sdpa strategy=ddp strategy.devices=2", small[0], "--batch", "8", "--steps", "1000000")
    process = start("benchmark", "training", *words, "strategy.accelerator=cpu")

    def running() -> int:
        commands = [_command(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
        return sum(b"timed_process" in command and bytes(tmp_path) in command for command in commands)

    deadline = time.monotonic() + 300
    while running() < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running() >= 2, "both ranks train"
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert running() == 0
    assert list((tmp_path / "temporary").iterdir()) == []


def _command(path: Path) -> bytes:
    """Of a process; nothing of one that has just ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
