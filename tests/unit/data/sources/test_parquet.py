"""Data sets of Hugging Face, imitated exactly: file names, row groups of a few images, and the metadata in the schema.

Where pixels matter the images are the shared sample's of ImageNet, and noise elsewhere.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from vit_efficient.data.manifest import read_manifest
from vit_efficient.data.preparation import prepare_source
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.sources.base import BadImage, Inputs, Source
from vit_efficient.data.sources.parquet import ParquetConfig
from vit_efficient.errors import CapabilityError, DataError

NAMES = ("angular_leaf_spot", "bean_rust", "healthy")
GROUP = 4
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def noise(*numbers: int) -> list[bytes]:
    return [np.random.default_rng(number).bytes(3000) for number in numbers]


def structs(images: Sequence[bytes | None]) -> pa.Array:
    return pa.array([{"bytes": data, "path": f"{k}.jpg"} for k, data in enumerate(images)], IMAGE)


def write(
    path: Path,
    images: Sequence[bytes | None],
    labels: Any,
    names: tuple[str, ...] | None = NAMES,
    column: pa.Array | None = None,
    group: int = GROUP,
    **options: Any,
) -> Path:
    """As `datasets` writes it: image, label, and the features beside the schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    table = pa.table({"image": structs(images) if column is None else column, "label": labels})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path, row_group_size=group, **options)
    return path


def beans(folder: Path, **options: Any) -> Path:
    """21 training images in three files, 5 for validation, 3 for testing; image k is noise k with label k modulo 3."""
    for name, numbers in (("train-00000-of-00003", range(9)), ("train-00001-of-00003", range(9, 10)),
                          ("train-00002-of-00003", range(10, 21)), ("validation-00000-of-00001", range(30, 35)),
                          ("test-00000-of-00001", range(40, 43))):  # fmt: skip
        write(folder / "data" / f"{name}.parquet", noise(*numbers), [k % 3 for k in numbers], **options)
    return folder


def open_source(path: Path, **columns: str) -> Source:
    return ParquetConfig().open(Inputs(path, **columns))  # type: ignore[arg-type]


def check_beans(source: Source) -> None:
    assert source.class_names == NAMES
    for split, numbers in (("train", range(21)), ("val", range(30, 35))):
        part = pickle.loads(pickle.dumps(source.splits[split]))
        assert part.labels.tolist() == [k % 3 for k in numbers]
        for index in np.random.default_rng(0).permutation(len(numbers)).tolist():
            assert part.read(index).data == noise(numbers[index])[0]
        assert len(pickle.dumps(part)) < 5000  # no images in it


@pytest.mark.parametrize("options", [
    {}, {"compression": "none"}, {"compression": "zstd", "use_dictionary": False}, {"data_page_version": "2.0"},
])  # fmt: skip
def test_a_folder_as_it_is_downloaded(tmp_path: Path, options: dict[str, Any]) -> None:
    source = open_source(beans(tmp_path, **options))
    check_beans(source)
    train = source.splits["train"]
    assert [train.name(k) for k in (0, 8, 9, 20)] == [
        "train-00000-of-00003/0", "train-00000-of-00003/8", "train-00001-of-00003/0", "train-00002-of-00003/10",
    ]  # fmt: skip


def test_the_data_folder_itself_or_one_file(tmp_path: Path) -> None:
    beans(tmp_path)
    check_beans(open_source(tmp_path / "data"))
    alone = open_source(tmp_path / "data" / "validation-00000-of-00001.parquet")
    assert list(alone.splits) == ["train"]
    assert alone.splits["train"].read(4).data == noise(34)[0]


def test_testing_serves_where_there_is_no_validation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (beans(tmp_path) / "data" / "validation-00000-of-00001.parquet").unlink()
    assert open_source(tmp_path).splits["val"].read(2).data == noise(42)[0]
    write(tmp_path / "data" / "test-00000-of-00001.parquet", noise(1, 2), [-1, -1])
    with caplog.at_level(logging.WARNING):
        assert list(open_source(tmp_path).splits) == ["train"]
    assert "test-00000-of-00001.parquet and its like have no labels" in caplog.text


def test_rows_are_scanned_in_order(tmp_path: Path) -> None:
    split = open_source(beans(tmp_path)).splits["train"]
    chosen = np.zeros(21, bool)
    chosen[[0, 3, 4, 9, 17, 20]] = True  # some row groups not at all
    assert list(split.scan(chosen)) == noise(0, 3, 4, 9, 17, 20)  # type: ignore[attr-defined]
    assert list(split.scan(np.ones(21, bool))) == noise(*range(21))  # type: ignore[attr-defined]


def test_a_large_row_group_is_scanned_in_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", noise(*range(50)), [0] * 50, group=50)
    chosen = np.zeros(50, bool)
    chosen[[1, 15, 16, 40, 49]] = True
    assert list(open_source(path).splits["train"].scan(chosen)) == noise(1, 15, 16, 40, 49)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(noise(1, 2, 3), pa.binary()),
        pa.array(noise(1, 2, 3), pa.large_binary()),
        pa.array([{"path": "", "bytes": data} for data in noise(1, 2, 3)], pa.struct([("path", pa.string()),
                                                                                    ("bytes", pa.large_binary())])),
    ],
    ids=["binary", "large binary", "large struct"],
)  # fmt: skip
def test_kinds_of_image_columns(tmp_path: Path, column: pa.Array) -> None:
    split = open_source(write(tmp_path / "x.parquet", [], [0, 1, 2], column=column)).splits["train"]
    assert [split.read(k).data for k in (2, 0, 1)] == noise(3, 1, 2)


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (pa.array(["dog", "cat", "dog"]), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"], pa.large_string()), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode(), ("cat", "dog"), [1, 0, 1]),
        (pa.array([1, 0, 2], pa.int8()), ("0", "1", "2"), [1, 0, 2]),
        (pa.array([10, 2, 10], pa.uint32()), ("2", "10"), [1, 0, 1]),
    ],
)
def test_kinds_of_label_columns(
    tmp_path: Path, labels: pa.Array, classes: tuple[str, ...], expected: list[int]
) -> None:
    source = open_source(write(tmp_path / "x.parquet", noise(1, 2, 3), labels, names=None))
    assert (source.class_names, source.splits["train"].labels.tolist()) == (classes, expected)


def test_strings_of_several_files_agree(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", noise(1, 2), ["b", "c"], names=None)
    write(tmp_path / "train-1.parquet", noise(3, 4), ["a", "b"], names=None)
    write(tmp_path / "val.parquet", noise(5), ["c"], names=None)
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert source.splits["train"].labels.tolist() == [1, 2, 0, 1]
    assert source.splits["val"].labels.tolist() == [2]
    write(tmp_path / "val.parquet", noise(5), ["d"], names=None)
    with pytest.raises(DataError, match="val has the label d, unknown to training"):
        open_source(tmp_path)


def test_other_columns(tmp_path: Path) -> None:
    table = pa.table({"img": structs(noise(1, 2)), "fine": [0, 1], "image.of": [1.0, 2.0]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert open_source(tmp_path, image_column="img", label_column="fine").splits["train"].labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"no column 'image', but: img \(struct<.*>\), fine \(int64\)"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"no column 'label'.*--label-column"):
        open_source(tmp_path, image_column="img")
    with pytest.raises(DataError, match=r"'fine' is of int64; expected encoded images"):
        open_source(tmp_path, image_column="fine", label_column="fine")
    with pytest.raises(DataError, match=r"'image.of' is of double; expected one whole number or one name"):
        open_source(tmp_path, image_column="img", label_column="image.of")


def test_rows_without_an_image(tmp_path: Path) -> None:
    """As when a data set was pushed with paths only, or an image was lost."""
    column = pa.array([{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}, None], IMAGE)
    split = open_source(write(tmp_path / "x.parquet", [], [0, 1, 2], column=column)).splits["train"]
    assert list(split.scan(np.ones(3, bool))) == [b"x", None, None]  # type: ignore[attr-defined]
    for index in (1, 2):
        with pytest.raises(BadImage, match="has no image"):
            split.read(index)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "train has the label 3, unknown to the schema's 3 class names"),
        ([0, -1, 2], "train has the label -1, unknown"),
        ([0, None, None], "2 rows have no label, the first is row 1"),
        (pa.array([0.5, 1, 2]), "'label' is of double"),
        (pa.array([[0], [1], [1, 2]]), r"'label' is of list<"),
        (pa.array([], pa.int64()), "the files for train hold no rows"),
    ],
)
def test_labels_that_do_not_serve(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(write(tmp_path / "x.parquet", noise(1, 2, 3)[: len(labels)], labels))


def test_files_that_disagree(tmp_path: Path) -> None:
    other = beans(tmp_path) / "data" / "validation-00000-of-00001.parquet"
    write(other, noise(1), [0], names=(*NAMES, "mouldy"))
    with pytest.raises(DataError, match=r"validation-.* has other columns or classes than .*train-00000"):
        open_source(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", noise(*range(8)), [0] * 8, compression="none")
    split = open_source(path).splits["train"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="is not a whole parquet file"):
        open_source(path)
    with pytest.raises(DataError, match="is not a whole parquet file"):
        split.read(0)
    path.write_bytes(b"PAR1" + bytes(3000) + whole[3004:])  # a page's header is lost
    with pytest.raises(DataError, match="is not a whole parquet file"):
        list(split.scan(np.ones(8, bool)))  # type: ignore[attr-defined]
    table = parquet.read_table(write(path, noise(1), [0])).replace_schema_metadata({"huggingface": "{"})
    parquet.write_table(table, path)
    with pytest.raises(DataError, match="metadata of Hugging Face in its schema cannot be read"):
        open_source(path)


def test_pyarrow_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CapabilityError, match=r"pip install -e '\.\[parquet\]'"):
        open_source(tmp_path)


def test_what_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="parquet needs a folder or a file"):
        ParquetConfig().open(Inputs())
    with pytest.raises(DataError, match="no use for --train"):
        ParquetConfig().open(Inputs(tmp_path, train=tmp_path))


def test_identity_tells_inputs_apart(tmp_path: Path) -> None:
    first = open_source(beans(tmp_path)).identity
    assert open_source(tmp_path).identity == first
    (tmp_path / "data").rename(tmp_path / "moved")
    assert open_source(tmp_path).identity == first
    write(tmp_path / "moved" / "validation-00000-of-00001.parquet", noise(*range(30, 35)), [0, 1, 2, 1, 1])
    relabelled = open_source(tmp_path).identity
    assert relabelled["train"] == first["train"]
    assert relabelled["val"] != first["val"]


def test_identity_tells_images_of_other_sizes_apart(tmp_path: Path) -> None:
    """Where all images together are as large."""
    found = []
    for lengths in ((6000, 5000, 5000, 5000, 5000), (5000, 5000, 5000, 5000, 6000)):
        images = [np.random.default_rng(0).bytes(length) for length in lengths]
        path = write(tmp_path / "x.parquet", images, [0] * 5, compression="none", use_dictionary=False)
        found.append((path.stat().st_size, str(open_source(path).identity)))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_parquet_to_shards(tmp_path: Path, photographs: list[tuple[str, bytes]]) -> None:
    """Real images in imitated files: what comes out of the shards are those images with their classes."""
    names = tuple(wnid for wnid, _ in photographs)
    for split in ("train", "validation"):
        for part in range(2):
            data = [image for _, image in photographs[6 * part : 6 * part + 6]]
            path = tmp_path / "set" / "data" / f"{split}-{part:05d}-of-00002.parquet"
            write(path, data, list(range(6 * part, 6 * part + 6)), names)
    prepare_source(open_source(tmp_path / "set"), tmp_path / "out")
    for split in ("train", "val"):
        manifest = read_manifest(tmp_path / "out" / split)
        with ShardReader(ShardSet(tmp_path / "out" / split, manifest), 12) as reader:
            samples = [reader.read(0, number) for number in range(12)]
        assert {(manifest.class_names[one.label], one.image) for one in samples} == set(photographs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]  # no copy is left
