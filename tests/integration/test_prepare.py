"""`python -m vit_efficient.prepare` as a person runs it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
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
    assert re.search(r"train: 1,437 of 1,437 images, [\d,]+/s, 3 MB", err)  # no terminal: lines
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


@pytest.fixture(scope="module")
def photographs(shared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,000 real photographs in three class folders: 1,000 from ImageNet, three times by links."""
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(shared("data/ILSVRC2012_sample_train.tar")) as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(folder / "all", filter="data")
    files = sorted((folder / "all").iterdir())
    assert len(files) == 1000
    for name in ("one", "two", "three"):
        (folder / "classes" / name).mkdir(parents=True)
        for file in files:
            (folder / "classes" / name / file.name).symlink_to(file)
    return folder / "classes"


def children(pid: int) -> list[int]:
    """Processes started by this one, and by those."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(stat.parent.name)
            found += [child, *children(child)]
    return found


@pytest.mark.slow
def test_killed_again_and_again_with_several_processes(photographs: Path, tmp_path: Path) -> None:
    """Every start goes on from the last whole shard; in the end all bytes are those of one undisturbed process."""
    words = ("folder", photographs, "--val-fraction", "0.1", "--shard-size", "150")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert main([*map(str, words), "--processes", "1", "--out", str(whole)]) == 0
    rng, done = random.Random(0), 0
    for _ in range(5):
        process = start(*words, "--processes", "2", "--out", out)
        wait_for_shards(process, out, done + rng.choice((1, 2)))
        time.sleep(rng.uniform(0, 0.3))
        workers = children(process.pid)
        process.kill()
        process.communicate()  # until the last process that holds its output has ended
        assert all(ends(worker) for worker in workers), "a worker outlives its parent"
        assert finished_shards(out) >= done
        done = finished_shards(out)
    assert 3 <= done < 20
    code, _, _ = run(*words, "--processes", "2", "--out", out)
    assert code == 0
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_killed_at_random_times_while_the_archive_is_read(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """The ImageNet archive itself, re-encoded by two processes; killed wherever that happens to be."""
    archive = shared("data/ILSVRC2012_sample_train.tar")
    words = ("imagenet", "--train", archive, "--shard-size", "40", "--shortest-side", "200", "--quality", "80")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert main([*map(str, words), "--processes", "1", "--out", str(whole)]) == 0
    manifest = json.loads((whole / "train" / "manifest.json").read_text())
    assert (manifest["options"]["shortest_side"], manifest["options"]["quality"]) == (200, 80)
    rng, done = random.Random(1), 0
    for _ in range(3):
        process = start(*words, "--processes", "2", "--out", out)
        wait_for_shards(process, out, done + 1)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        done = finished_shards(out)
    assert 3 <= done < 25
    code, _, _ = run(*words, "--processes", "2", "--out", out)
    assert code == 0
    assert contents(out) == contents(whole)


def wait_for_shards(process: subprocess.Popen[str], out: Path, wanted: int) -> None:
    deadline = time.monotonic() + 60
    while finished_shards(out) < wanted:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it does not get on"
        time.sleep(0.01)


def finished_shards(out: Path) -> int:
    return len(list(out.glob("*/*.idx.npy")))


def ends(pid: int) -> bool:
    """Whether a process is gone within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_an_explanation(photographs: Path, tmp_path: Path) -> None:
    process = start("folder", photographs, "--processes", "2", "--shard-size", "100", "--out", tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("train/*.tar")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = [pid for pid in children(process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "was killed" in err
    assert "goes on from the last whole shard" in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_memory_does_not_grow_with_the_set(photographs: Path, tmp_path: Path, processes: int) -> None:
    """Ten times the images (33 MB and 330 MB), not ten times the memory: of the largest of the processes."""
    peaks = []
    for name, images in (("small", 100), ("large", 1000)):
        for one in photographs.iterdir():
            (tmp_path / name / one.name).mkdir(parents=True)
            for file in sorted(one.iterdir())[:images]:
                (tmp_path / name / one.name / file.name).symlink_to(file)
        process = start("folder", tmp_path / name, "--processes", processes, "--out", tmp_path / f"{name}-out")
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.1 * peaks[0], peaks


def test_what_is_left_out_is_summed_up(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 30)
    for number, data in ((3, b""), (4, b""), (5, b"<html>")):
        (folder / f"class{number % 3}" / f"{number:04d}.png").write_bytes(data)
    code, out, err = run("folder", folder, "--out", tmp_path / "out", "--max-bad", "0.1")
    assert code == 0
    assert "27 images of 3 classes in 1 shard" in out
    assert "3 left out" in out
    assert "left out, 2: empty" in out
    assert "left out, 1: not an image" in out
    assert f"left_out in {tmp_path}/out/train/manifest.json" in out
    assert "class0/0003.png: empty" in "".join(err.split("\n"))
    listed = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())["left_out"]
    assert sorted(one["name"] for one in listed) == ["class0/0003.png", "class1/0004.png", "class2/0005.png"]
    code, out, err = run("folder", folder, "--out", tmp_path / "other")
    assert code == 2
    assert "images cannot be used, more than 1.0%" in err


def test_verify_does_not_pass_over_what_is_unfinished(tmp_path: Path) -> None:
    main(["digits", "--out", str(tmp_path / "out")])
    (tmp_path / "out" / "val" / "manifest.json").rename(tmp_path / "out" / "val" / ".unfinished")
    code, out, _ = run("--verify", tmp_path / "out")
    assert code == 2
    assert "val: not finished" in out


def test_verify_finds_what_was_altered(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    main(["folder", str(photos(tmp_path / "photos", 60)), "--out", str(folder), "--shard-size", "10"])
    code, out, _ = run("--verify", folder)
    assert (code, "60 samples in 6 shards are as they were written" in out) == (0, True)

    train = folder / "train"
    altered = bytearray((train / "train-000001.tar").read_bytes())
    altered[3000] ^= 1
    (train / "train-000001.tar").write_bytes(altered)
    os.truncate(train / "train-000002.tar", 5000)
    (train / "train-000003.tar").unlink()
    (train / "train-000004.idx.npy").write_bytes(b"")
    (train / "train-000009.tar").write_bytes(b"")
    code, out, err = run("--verify", folder, "--processes", "2")
    assert code == 2
    assert "Traceback" not in err
    for said in (
        r"train-000001.tar: its sha256 is not the manifest's",
        r"train-000001.tar: sample \d{8}_\S+ \(number 0\): its bytes are not those that were written",
        r"train-000002.tar: 5,000 bytes, [\d,]+ in the manifest",
        r"train-000003.tar: not there",
        r"train-000004.tar: The offset index .* cannot be read",
        r"train-000009.tar: not in the manifest",
        r"class class\d has \d+ samples, \d+ in the manifest",
    ):
        assert re.search(said, out), (said, out)
    assert "train-000000" not in out
    assert "train-000005" not in out


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupt_ends_without_a_traceback(tmp_path: Path, processes: int) -> None:
    images = photos(tmp_path / "photos", 300, 256)
    process = start("folder", images, "--processes", processes, "--out", tmp_path / "out")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "train").glob(".train-*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "goes on from the last whole shard" in err
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
        (["index", "x-{0..3}.tar", "--devkit", "x"], "index has no use for --devkit"),
        (["tiny_imagenet", "x.zip", "--labels", "x", "--out", "OUT"], "tiny_imagenet has no use for --labels"),
        (["digits", "--out", "OUT", "--classes", "x"], "--classes belongs to"),
        (["digits", "--out", "OUT", "--shard-size", "7 parsec"], "expected a number of samples"),
        (["digits", "--out", "/proc/nothing"], "cannot be made"),
        (["digits", "--outt", "x"], "there is no option --outt"),
        ([], "needs a SOURCE"),
        (["digits", "--verify", "x"], "stands alone"),
        (["--verify", "absent"], "has no manifest.json"),
        (["digits", "--out", "OUT", "--quality", "90"], "belongs to --shortest-side"),
        (["digits", "--out", "OUT", "--shortest-side", "9", "--quality", "101"], "expected 1 to 100"),
        (["digits", "--out", "OUT", "--shortest-side", "0"], "at least 1"),
        (["digits", "--out", "OUT", "--processes", "0"], "at least 1"),
        (["digits", "--out", "OUT", "--max-bad", "1.5"], "expected a share"),
        (["digits", "--out", "OUT", "--no-decode"], "belongs to --verify"),
        (["--verify", "x", "--out", "OUT", "--seed", "1"], "--verify has no use for --out, --seed"),
        (["index", "x-{0..3}.tar", "--out", "OUT"], "index has no use for --out"),
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
