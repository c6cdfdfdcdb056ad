from __future__ import annotations

from pathlib import Path

import pytest

from vit_efficient.data.sources.parquet_files import find_files
from vit_efficient.errors import DataError


def made(folder: Path, names: str) -> Path:
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            "data/train-00000-of-00002-0a1b2c3d4e5f6789.parquet data/train-00001-of-00002-fedcba9876543210.parquet "
            "data/validation-00000-of-00001-0a1b2c3d4e5f6789.parquet README.md .cache/huggingface/train.parquet",
            {"train": 2, "validation": 1},
        ),
        (
            "train/0000.parquet train/0001.parquet val/0000.parquet test/0000.parquet",
            {"train": 2, "validation": 1, "test": 1},
        ),
        ("plain_text/partial-train/0000.parquet plain_text/partial-test/0000.parquet", {"train": 1, "test": 1}),
        ("beans-train.parquet beans-dev.parquet", {"train": 1, "validation": 1}),
        ("Train.parquet VALID.parquet", {"train": 1, "validation": 1}),
        ("0.parquet 1.parquet 2.parquet", {"train": 3}),
        ("constrained.parquet latest.parquet", {"train": 2}),  # words that hold `train` and `test`
    ],
)
def test_splits_by_name(tmp_path: Path, names: str, expected: dict[str, int]) -> None:
    found = find_files(made(tmp_path / "set", names))
    assert {split: len(files) for split, files in found.items()} == expected
    assert all(files == sorted(files) for files in found.values())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("readme.txt", "holds no .parquet files"),
        ("a/train.parquet b/train.parquet", "several data sets: a, b. Name one"),
        ("a/train/0.parquet a/val/0.parquet b/train/0.parquet", "several data sets: a, b"),
        ("train.parquet extra.parquet", "extra.parquet does not say what it belongs to"),
        ("validation.parquet test.parquet", "no training files, but test, validation"),
        ("train-00000-of-00003.parquet train-00002-of-00003.parquet", "1 of 3 files are missing .* number 00001"),
        ("train-00000-of-00001.parquet train-00000-of-00002.parquet train-00001-of-00002.parquet", "of two versions"),
        ("train-00000-of-00001-0a1b.parquet train-00000-of-00001-9f9f.parquet", "of two versions"),
    ],
)
def test_folders_that_do_not_serve(tmp_path: Path, names: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_files(made(tmp_path, names))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_files(tmp_path / "absent")
