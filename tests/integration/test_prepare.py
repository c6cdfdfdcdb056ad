"""`python -m vit_efficient.prepare` as a person runs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_efficient.data.config import AugmentConfig, DataConfig
from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.data.image import ImageSpec
from vit_efficient.errors import UserError
from vit_efficient.prepare import main, parse_size

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "ILSVRC2012_sample_train.tar"


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vit_efficient.prepare", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*words: object) -> tuple[int, str, str]:
    process = start(*words)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("**/*")) if path.is_file()}


def photos(folder: Path, count: int, side: int = 64) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 3}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def test_digits_twice_give_the_same_bytes(tmp_path: Path) -> None:
    code, out, err = run("digits", "--out", tmp_path / "a")
    assert (code, "Traceback" in err) == (0, False)
    assert "train: 1,437 images of 10 classes in 1 shard" in out
    assert "val: 360 images" in out
    assert "images/s" in err  # the progress bar
    assert main(["digits", "--out", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(contents(tmp_path / "a")) == {
        f"{split}/{name}"
        for split in ("train", "val")
        for name in ("manifest.json", f"{split}-000000.tar", f"{split}-000000.idx.npy")
    }
    code, out, _ = run("digits", "--out", tmp_path / "a")
    assert code == 0
    assert "complete already" in out
    code, _, err = run("digits", "--out", tmp_path / "a", "--seed", 1)
    assert code == 2
    assert "already prepared" in err
    assert "Traceback" not in err


def test_killed_and_started_again(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 400)
    words = ("folder", folder, "--val-fraction", "0.1", "--shard-size", "20")
    assert main([*map(str, words), "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    process = start(*words, "--out", out)
    deadline = time.monotonic() + 60
    while not (out / "train" / "train-000003.tar").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "val" / "manifest.json").exists()
    code, _, _ = run(*words, "--out", out)
    assert code == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_an_interrupt_ends_without_a_traceback(tmp_path: Path) -> None:
    process = start("folder", photos(tmp_path / "photos", 300, 256), "--out", tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "train").glob(".train-*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    left = {path.name for path in (tmp_path / "out" / "train").iterdir()}
    assert ".unfinished" in left
    assert not [name for name in left if name.endswith(".partial") or name == "manifest.json"], left


def test_shards_of_others_are_indexed_and_streamed(tmp_path: Path) -> None:
    main(["folder", str(photos(tmp_path / "photos", 30)), "--out", str(tmp_path / "made"), "--shard-size", "8"])
    folder = tmp_path / "made" / "train"
    for path in [*folder.glob("*.npy"), *folder.glob("*.json")]:
        path.unlink()
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    pattern = f"{folder}/train-{{000000..000003}}.tar"
    code, out, _ = run("index", pattern, "--classes", tmp_path / "classes.txt")
    assert code == 0
    assert "30 images of 3 classes in 4 shards" in out
    assert json.loads((folder / "manifest.json").read_text())["class_names"] == ["red", "green", "blue"]
    config = DataConfig(source={"name": "folder"}, shards=pattern, eval_shards=pattern, batch_size=8)
    data = ViTDataModule(config, AugmentConfig(), ImageSpec(16, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0))
    keys = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert len(set(keys)) == len(keys) == 30


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["folder", "absent", "--out", "OUT"], "absent: there is no such folder"),
        (["digits"], "needs --out DIR"),
        (["digits", "somewhere", "--out", "OUT"], "come with scikit-learn"),
        (["cifar10", "--out", "OUT"], "needs the archive"),
        (["imagenet", "--out", "OUT"], "--train"),
        (["nonsense", "--out", "OUT"], "invalid choice"),
        (["index"], "index takes a pattern"),
        (["index", "absent/x-{0..3}.tar"], "no folder absent"),
        (["digits", "--out", "OUT", "--classes", "x"], "--classes belongs to"),
        (["digits", "--out", "OUT", "--shard-size", "7 parsec"], "expected a number of samples"),
        (["digits", "--out", "/proc/nothing"], "cannot be made"),
        (["digits", "--outt", "x"], "there is no option --outt"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out") if word == "OUT" else word for word in words])
    assert not (tmp_path / "out").exists()


def test_sizes() -> None:
    assert parse_size("10000").samples == 10_000
    assert parse_size("256MB").bytes == 256_000_000
    assert parse_size("1GiB").bytes == 2**30
    with pytest.raises(UserError):
        parse_size("0")


@pytest.mark.skipif(not SAMPLE.is_file(), reason=f"{SAMPLE.name} is not in shared/data")
def test_the_imagenet_sample(tmp_path: Path) -> None:
    """1,000 real images in the official layout; a JPEG goes into the shards byte for byte."""
    words = ["imagenet", "--train", str(SAMPLE), "--val", str(SAMPLE), "--out", str(tmp_path), "--shard-size", "32MB"]
    assert main(words) == 0
    size = ImageSpec(64, (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    data = ViTDataModule(
        DataConfig(source={"name": "imagenet"}, shards=str(tmp_path), batch_size=200), AugmentConfig(), size, workers=2
    )
    assert (data.train_images, data.eval_images, data.num_classes) == (1000, 1000, 1000)
    assert data.class_counts == [1] * 1000
    assert data.class_names[0] == "n01440764"
    assert data.class_names == sorted(data.class_names)
    assert data.train_manifest is not None
    assert len(data.train_manifest.shards) == 4
    found = {}
    for batch in data.val_dataloader():
        assert batch["weight"].min() == 1
        found |= dict(zip(batch["key"], batch["label"].tolist(), strict=True))
    assert sorted(found.values()) == list(range(1000))
    assert all(data.class_names[label] in key for key, label in found.items())
    data.teardown("validate")
