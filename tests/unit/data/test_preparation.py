from __future__ import annotations

import fcntl
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_efficient.data import preparation
from vit_efficient.data.cache import ensure_digits
from vit_efficient.data.encode import encode_png
from vit_efficient.data.manifest import read_manifest
from vit_efficient.data.preparation import Options, clean, prepare_source
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.resolve import resolve_shards
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.shard_writer import ShardSize
from vit_efficient.data.sources.base import BadImage, Inputs, RawImage, Source
from vit_efficient.data.sources.digits import DigitsConfig
from vit_efficient.data.sources.folder import FolderConfig
from vit_efficient.errors import DataError


def numbered(number: int) -> bytes:
    """A picture of a number."""
    return encode_png(np.full((1, 1, 3), (number >> 8, number & 255, 7), np.uint8))


def number_of(image: bytes) -> int:
    high, low, _ = np.asarray(Image.open(io.BytesIO(image)))[0, 0].tolist()
    return high << 8 | low


class Numbers:
    """Images that are their own number; some may be bad, and reading may end the process."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), dies_at: int = -1) -> None:
        self.labels = np.arange(count) * 4 // count  # class by class, as archives are
        self.bad, self.dies_at, self.reads = bad, dies_at, 0

    def name(self, index: int) -> str:
        return f"n{index}.png"

    def read(self, index: int) -> RawImage:
        self.reads += 1
        if self.reads == self.dies_at:
            os._exit(9)  # as kill -9: nothing is cleaned up
        if index in self.bad:
            raise BadImage("broken")
        return RawImage(self.name(index), numbered(index))


def source(count: int = 40, **options: object) -> Source:
    return Source("numbers", ("a", "b", "c", "d"), {"train": Numbers(count, **options)}, {"count": count})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("**/*")) if path.is_file()}


def read_all(folder: Path) -> list[tuple[str, int, bytes]]:
    manifest = read_manifest(folder)
    with ShardReader(ShardSet(folder, manifest), len(manifest.class_names)) as reader:
        samples = [reader.read(s, i) for s, entry in enumerate(manifest.shards) for i in range(entry.samples)]
    return [(sample.key, sample.label, sample.image) for sample in samples]


def test_order_is_a_permutation_of_the_whole_set(tmp_path: Path) -> None:
    prepare_source(source(400), tmp_path, Options(size=ShardSize(samples=100)))
    samples = read_all(tmp_path / "train")
    numbers = [number_of(image) for _, _, image in samples]
    assert sorted(numbers) == list(range(400))
    assert all(label == number * 4 // 400 for (_, label, _), number in zip(samples, numbers, strict=True))
    assert samples[0][0] == f"{numbers[0]:08d}_n{numbers[0]}"
    for start in range(0, 400, 100):  # every shard has every class, none more than half of it
        shares = Counter(label for _, label, _ in samples[start : start + 100])
        assert len(shares) == 4
        assert max(shares.values()) < 50


def test_seed_and_options_decide_the_bytes(tmp_path: Path) -> None:
    for name, options in (("a", Options()), ("b", Options()), ("c", Options(seed=1))):
        prepare_source(source(), tmp_path / name, options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first, other = (read_all(tmp_path / name / "train") for name in "ac")
    assert first != other
    assert sorted(first) == sorted(other)


def test_val_fraction_takes_each_class_alike(tmp_path: Path) -> None:
    made = prepare_source(source(), tmp_path, Options(val_fraction=0.1))
    assert made["train"].class_counts == (9, 9, 9, 9)
    assert made["val"].class_counts == (1, 1, 1, 1)
    numbers = [number_of(image) for split in ("train", "val") for _, _, image in read_all(tmp_path / split)]
    assert sorted(numbers) == list(range(40))
    found = resolve_shards(str(tmp_path))
    assert found.eval.manifest == made["val"]


@pytest.mark.parametrize(
    ("options", "message"), [(Options(val_fraction=1.5), "not between"), (Options(val_fraction=0.001), "sets none")]
)
def test_senseless_fractions(tmp_path: Path, options: Options, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare_source(source(), tmp_path, options)
    with pytest.raises(DataError, match="validation images of its own"):
        prepare_source(DigitsConfig().open(Inputs()), tmp_path, Options(val_fraction=0.1))


def test_a_finished_folder_is_kept_if_identical_and_refused_otherwise(tmp_path: Path) -> None:
    first = source()
    prepare_source(first, tmp_path, Options(val_fraction=0.2))
    before = contents(tmp_path)
    again = source(dies_at=1)
    prepare_source(again, tmp_path, Options(val_fraction=0.2))  # reads nothing, or it would die
    for other, options in (
        (source(), Options(val_fraction=0.3)),
        (source(), Options()),
        (source(), Options(val_fraction=0.2, seed=1)),
        (source(41), Options(val_fraction=0.2)),
        (DigitsConfig().open(Inputs()), Options()),
    ):
        with pytest.raises(DataError, match=r"already prepared.*other input or options"):
            prepare_source(other, tmp_path, options)
    assert contents(tmp_path) == before
    os.truncate(tmp_path / "train" / "train-000000.tar", 100)
    with pytest.raises(DataError, match="truncated"):
        prepare_source(source(), tmp_path, Options(val_fraction=0.2))


BAD = (2, 17, 31)
KILLED = Options(size=ShardSize(samples=10), val_fraction=0.25, max_bad=0.2)


def _die(out: Path, at: int) -> None:
    prepare_source(source(dies_at=at, bad=BAD), out, KILLED)


@pytest.mark.parametrize("at", [2, 10, 11, 25, 30])
def test_a_killed_run_can_be_started_again_and_ends_in_the_same_bytes(tmp_path: Path, at: int) -> None:
    prepare_source(source(bad=BAD), tmp_path / "whole", KILLED)
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path / "killed", at))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert not (tmp_path / "killed" / "train" / "manifest.json").exists()
    assert list((tmp_path / "killed" / "train").glob(".*.partial"))
    whole = len(list((tmp_path / "killed" / "train").glob("*.tar")))
    told: list[int] = []
    made = prepare_source(source(bad=BAD), tmp_path / "killed", KILLED, lambda *what: told.append(what[3]))
    assert told[0] == sum(entry.bytes for entry in made["train"].shards[:whole])
    assert sum(len(manifest.left_out) for manifest in made.values()) == 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


STEPS = {"open", "os.remove", "os.rename", "os.mkdir", "os.truncate", "fcntl.flock"}


def _die_before(step: int, out: Path) -> None:
    """End as by `kill -9` when this step of all that are done to files in `out` is about to be taken."""
    taken = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal taken
        if event in STEPS and (event == "fcntl.flock" or str(arguments[0]).startswith(str(out))):
            taken += 1
            if taken == step:
                os._exit(9)

    sys.addaudithook(count)
    prepare_source(source(bad=BAD), out, KILLED)


def test_killed_before_any_step_at_all_it_can_be_started_again(tmp_path: Path) -> None:
    """Before each file that is opened, renamed or removed, one after the other; then once more while it goes on."""
    prepare_source(source(bad=BAD), tmp_path / "whole", KILLED)
    whole = contents(tmp_path / "whole")
    out, ended, step = tmp_path / "killed", None, 0
    while ended != 0:
        step += 1
        for again in (step, 6):
            process = multiprocessing.get_context("fork").Process(target=_die_before, args=(again, out))
            process.start()
            process.join()
            ended = process.exitcode if again == step else ended
        prepare_source(source(bad=BAD), out, KILLED)
        assert contents(out) == whole, step
        shutil.rmtree(out)
    assert step > 40


def test_an_unfinished_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path / "killed", 25))
    process.start()
    process.join()
    before = contents(tmp_path / "killed")
    assert len(before) > 4  # two whole shards, their indices, a part of the third
    with pytest.raises(DataError, match=r"unfinished run with other input or options \(shard_samples, val_fraction\)"):
        prepare_source(source(), tmp_path / "killed", Options(size=ShardSize(samples=11)))
    assert contents(tmp_path / "killed") == before


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path, 25))
    process.start()
    process.join()
    journal = tmp_path / "train" / ".unfinished"
    text = journal.read_bytes()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 3
    for damaged in (b"", b"junk\n" + text, lines[1] + lines[2], lines[0] + b'{"shard": {}}\n' + lines[2]):
        journal.write_bytes(damaged)
        with pytest.raises(DataError, match=r"\.unfinished is damaged"):
            prepare_source(source(bad=BAD), tmp_path, KILLED)
    journal.write_bytes(text)
    (tmp_path / "train" / "train-000001.idx.npy").unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar, which an unfinished run had written"):
        prepare_source(source(bad=BAD), tmp_path, KILLED)


def test_another_version_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It might write other bytes."""
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path, 25))
    process.start()
    process.join()
    monkeypatch.setattr(preparation, "__version__", "99")
    with pytest.raises(DataError, match=r"unfinished run with other input or options \(written_by\)"):
        prepare_source(source(bad=BAD), tmp_path, KILLED)


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(DataError, match="train is not empty"):
        prepare_source(source(), tmp_path)
    assert contents(tmp_path) == {"train/train-000000.tar": b"somebody's"}


def test_bad_images_are_left_out_and_listed_up_to_a_share(tmp_path: Path) -> None:
    made = prepare_source(source(200, bad=(3, 150)), tmp_path / "a")["train"]
    assert made.samples == 198
    assert made.class_counts == (49, 50, 50, 49)
    assert sorted((item.name, item.reason) for item in made.left_out) == [("n150.png", "broken"), ("n3.png", "broken")]
    with pytest.raises(
        DataError, match=r"(?s)3 of 200 images cannot be used, more than 1\.0%.*n3\.png: broken.*--max-bad"
    ):
        prepare_source(source(200, bad=(3, 4, 5)), tmp_path / "b")
    assert not (tmp_path / "b" / "train" / "manifest.json").exists()
    # what it had done is kept, and a greater share allowed goes on from there
    assert prepare_source(source(200, bad=(3, 4, 5)), tmp_path / "b", Options(max_bad=0.02))["train"].samples == 197


def test_of_many_bad_images_some_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = tuple(range(0, 60, 2))
    made = prepare_source(source(60, bad=bad), tmp_path / "a", Options(max_bad=0.5))["train"]
    assert len(made.left_out) == 30
    assert len(caplog.messages) == 21
    assert "more, which the manifest will list" in caplog.messages[-1]
    with pytest.raises(DataError, match=r"29 of 60 images(?s:.)*and 9 more"):
        prepare_source(source(60, bad=bad), tmp_path / "b", Options(max_bad=28 / 60))


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="Another process is writing"):
        prepare_source(source(), tmp_path)
    os.close(descriptor)
    prepare_source(source(), tmp_path)


def _fill(out: Path) -> None:
    """No file may grow past 40 kB, as if the disk were full; ends the process with 7 if that was explained."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        prepare_source(source(400), out)
    except DataError as error:
        os._exit(7 if "cannot be written" in str(error) else 8)


def test_a_full_disk_is_explained_and_leaves_no_half_of_a_shard(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_fill, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert [path.name for path in (tmp_path / "train").iterdir()] == [".unfinished"]
    assert prepare_source(source(400), tmp_path)["train"].samples == 400


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    told_bytes: list[int] = []

    def progress(part: str, done: int, total: int, volume: int = 0) -> None:
        told.append((part, done, total))
        told_bytes.append(volume)

    made = prepare_source(source(8), tmp_path, Options(val_fraction=0.5), progress)
    assert told == [(split, done, 4) for split in ("train", "val") for done in range(5)]
    # but for the end of the tar, which comes last
    assert told_bytes[4] == made["train"].shards[0].bytes - 1024
    assert told_bytes[:4] == [told_bytes[4] * done // 4 for done in range(4)]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("cat/one.two.png", "cat_one_two"),
        ("ILSVRC2012_val_00000001", "ILSVRC2012_val_00000001"),
        ("a.b/c", "a_b_c"),
        ("ünï cødé.jpg", "_n_c_d_"),
        ("x" * 100, "x" * 60),
    ],
)
def test_keys_have_nothing_that_a_tar_or_webdataset_takes_otherwise(name: str, key: str) -> None:
    assert clean(name) == key


def test_a_folder_of_images_goes_all_the_way(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    originals = {}
    for number in range(30):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(buffer, "JPEG")
        path = tmp_path / "photos" / f"class {number % 3}" / f"img.{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        originals[buffer.getvalue()] = number % 3
    made = prepare_source(FolderConfig().open(Inputs(tmp_path / "photos")), tmp_path / "out")["train"]
    assert made.class_names == ("class 0", "class 1", "class 2")
    read = read_all(tmp_path / "out" / "train")
    assert {image: label for _, label, image in read} == originals
    assert len({key for key, _, _ in read}) == 30


def _ensure(cache: Path, _: int) -> str:
    return str(ensure_digits(cache))


def test_digits_are_prepared_once_by_racing_processes(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(_ensure, [(tmp_path, number) for number in range(4)])
    assert len(set(folders)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [Path(folders[0]).name]  # no temporary folder is left
    assert len(read_all(Path(folders[0]) / "train")) == 1437
    marked = Path(folders[0]) / "mark"
    marked.touch()
    ensure_digits(tmp_path)
    assert marked.exists()  # the second time it is found


def test_damaged_digits_are_made_again(tmp_path: Path) -> None:
    folder = ensure_digits(tmp_path)
    before = contents(folder)
    os.truncate(folder / "train" / "train-000000.tar", 1000)
    (folder / "val" / "val-000000.idx.npy").unlink()
    assert ensure_digits(tmp_path) == folder
    assert contents(folder) == before
