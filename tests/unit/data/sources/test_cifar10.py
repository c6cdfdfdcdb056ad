"""All forms of CIFAR-10, imitated with 4 images a batch (the real archives are 160 MB)."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_efficient.data.sources.base import Inputs, Source
from vit_efficient.data.sources.cifar10 import Cifar10Config
from vit_efficient.errors import DataError

EACH = 4
NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
RNG = np.random.default_rng(0)
PIXELS = {name: RNG.integers(0, 256, (EACH, 32, 32, 3), dtype=np.uint8) for name in NAMES}
LABELS = {name: RNG.integers(0, 10, EACH) for name in NAMES}


def planar(name: str) -> np.ndarray:
    return PIXELS[name].transpose(0, 3, 1, 2).reshape(EACH, -1)


def binary() -> dict[str, bytes]:
    rows = {name: np.concatenate([LABELS[name][:, None].astype(np.uint8), planar(name)], 1) for name in NAMES}
    return {f"cifar-10-batches-bin/{name}.bin": row.tobytes() for name, row in rows.items()}


def python() -> dict[str, bytes]:
    def batch(name: str) -> bytes:
        content = {b"batch_label": b"x", b"labels": LABELS[name].tolist(), b"data": planar(name), b"filenames": [b"a"]}
        return pickle.dumps(content, protocol=2)

    return {"cifar-10-batches-py/batches.meta": b"never read"} | {f"cifar-10-batches-py/{n}": batch(n) for n in NAMES}


def python2() -> dict[str, bytes]:
    """As the official archive is: strings of Python 2, which are bytes without saying so."""
    files = {}
    for name in NAMES:
        raw = planar(name).tobytes()
        text = (
            b"(dp1\nS'labels'\np2\n(lp3\n" + b"".join(b"I%d\na" % label for label in LABELS[name])
            + b"sS'data'\np4\ncnumpy.core.multiarray\n_reconstruct\np5\n(cnumpy\nndarray\np6\n(I0\ntS'b'\ntRp7\n"
            + b"(I1\n(I%d\nI3072\ntcnumpy\ndtype\np8\n(S'u1'\nI0\nI1\ntRp9\n(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n" % EACH
            + b"T" + len(raw).to_bytes(4, "little") + raw + b"tbs."
        )  # fmt: skip
        files[f"cifar-10-batches-py/{name}"] = text
    return files


def sheets() -> dict[str, bytes]:
    files = {}
    for name in NAMES:
        buffer = io.BytesIO()
        Image.fromarray(PIXELS[name].reshape(EACH, 1024, 3)).save(buffer, "PNG")
        files[f"package/{name}.png"] = buffer.getvalue()
    labels = np.concatenate([LABELS[name] for name in NAMES[:5]]).tolist()
    files["package/train_lables.json"] = json.dumps(labels).encode()
    files["package/test_lables.json"] = json.dumps(LABELS["test_batch"].tolist()).encode()
    return files


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def unpacked(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def open_source(path: Path) -> Source:
    return Cifar10Config().open(Inputs(path))


@pytest.mark.parametrize("form", [binary, python, python2, sheets])
@pytest.mark.parametrize("packed", [True, False])
def test_every_form_gives_the_same(tmp_path: Path, form: Callable[[], dict[str, bytes]], packed: bool) -> None:
    source = open_source(archive(tmp_path / "c.tar.gz", form()) if packed else unpacked(tmp_path / "c", form()))
    assert source.identity == open_source(archive(tmp_path / "b.tar.gz", binary())).identity
    assert source.class_names[3] == "cat"
    for split, names in (("train", NAMES[:5]), ("val", NAMES[5:])):
        part = source.splits[split]
        assert np.array_equal(part.labels, np.concatenate([LABELS[name] for name in names]))
        for index, pixels in enumerate(np.concatenate([PIXELS[name] for name in names])):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(part.read(index).data))), pixels)


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "was_run"
    files = python()
    files["cifar-10-batches-py/data_batch_3"] = pickle.dumps({b"data": Hostile(target), b"labels": [0]}, protocol)
    with pytest.raises(DataError, match=r"data_batch_3 was refused.*posix\.mkdir.*binary"):
        open_source(archive(tmp_path / "c.tar.gz", files))
    assert not target.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        b"c_codecs\nlookup\n(S'x'\ntR.",
    ],
)
def test_nothing_but_the_few_names_needed_can_be_reached(tmp_path: Path, payload: bytes) -> None:
    files = python() | {"cifar-10-batches-py/data_batch_1": payload}
    with pytest.raises(DataError, match="was refused"):
        open_source(archive(tmp_path / "c.tar.gz", files))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b""}, "no CIFAR-10 train images.*cifar-10-binary"),
        ({k: v for k, v in binary().items() if "batch_2" not in k}, "4 of 5 train batches"),
        (binary() | {"x/data_batch_2.bin": b"123"}, "data_batch_2.bin is truncated"),
        (binary() | {"x/test_batch.bin": bytes([11]) + bytes(3072)}, "label 11 is out of range"),
        (python() | {"x/data_batch_2": b"garbage"}, "data_batch_2 is not a CIFAR-10 batch"),
        (python() | {"x/data_batch_2": pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, 2)}, "uint8"),
        (python() | {"x/data_batch_2": pickle.dumps([1])}, "not a CIFAR-10 batch"),
        (sheets() | {"x/train_lables.json": b"[1, 2]"}, "20 images, but 2 labels"),
        (sheets() | {"x/train_lables.json": b"{"}, "not a list of numbers"),
        (sheets() | {"x/test_batch.png": b"no"}, "test_batch.png cannot be decoded"),
        ({k: v for k, v in sheets().items() if "train_lables" not in k}, "no train_lables.json"),
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(archive(tmp_path / "c.tar.gz", files))


def test_a_cut_archive_and_none_at_all(tmp_path: Path) -> None:
    whole = archive(tmp_path / "c.tar.gz", binary()).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole tar"):
        open_source(tmp_path / "cut.tar.gz")
    with pytest.raises(DataError, match="no such archive"):
        open_source(tmp_path / "absent")
    with pytest.raises(DataError, match="needs the archive"):
        Cifar10Config().open(Inputs())
