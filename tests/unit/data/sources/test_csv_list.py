from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from vit_efficient.data.sources.base import BadImage, Inputs, Source
from vit_efficient.data.sources.csv_list import CsvConfig
from vit_efficient.errors import DataError


def listed(tmp_path: Path, text: str, files: str = "a.jpg b/c.png d.jpg") -> Path:
    """The CSV file, beside files that hold their own names."""
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "list.csv").write_text(text)
    return tmp_path / "list.csv"


def open_source(path: Path, **columns: str) -> Source:
    return CsvConfig().open(Inputs(path, **columns))  # type: ignore[arg-type]


def test_paths_and_labels(tmp_path: Path) -> None:
    path = listed(tmp_path, f'path,label\na.jpg,dog\n"b/c.png", cat\n\n{tmp_path}/d.jpg,dog\n')
    source = open_source(path)
    assert source.class_names == ("cat", "dog")
    assert list(source.splits) == ["train"]
    split = pickle.loads(pickle.dumps(source.splits["train"]))
    assert split.labels.tolist() == [1, 0, 1]
    assert [split.read(k).data for k in range(3)] == [b"a.jpg", b"b/c.png", b"d.jpg"]
    assert [split.name(k) for k in range(3)] == ["a.jpg", "b/c.png", f"{tmp_path}/d.jpg"]


def test_splits_and_numbers(tmp_path: Path) -> None:
    path = listed(tmp_path, "\ufefflabel,split,path\n10,train,a.jpg\n2,val,b/c.png\n2,train,d.jpg\n")
    source = open_source(path)
    assert source.class_names == ("2", "10")
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {"train": [1, 0], "val": [0]}
    assert source.splits["val"].read(0).data == b"b/c.png"


def test_other_columns(tmp_path: Path) -> None:
    path = listed(tmp_path, "id,photo,label,breed\n1,a.jpg,x,pug\n2,d.jpg,x,collie\n")
    assert open_source(path, image_column="photo", label_column="breed").class_names == ("collie", "pug")
    with pytest.raises(
        DataError, match=r"no column 'path'. The first line names 'id', 'photo', 'label', 'breed'; .*--image-column"
    ):
        open_source(path)
    with pytest.raises(DataError, match=r"no column 'race'.*--label-column"):
        open_source(path, image_column="photo", label_column="race")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'path'. The first line names none"),
        ("path;label\na.jpg;x\n", "no column 'path'. The first line names 'path;label'"),
        ("path,path,label\na.jpg,a.jpg,x\n", "2 columns 'path'"),
        ("path,label\n", "lists no images"),
        ("path,label,split\na.jpg,x,val\n", "lists no training images"),
        ("path,label\na.jpg,x\nd.jpg\n", "line 3 has 1 columns, the header 2"),
        ("path,label\na.jpg,x,y\n", "line 2 has 3 columns, the header 2"),
        ("path,label\na.jpg,\n", "line 2 has no label"),
        ("path,label\n,x\n", "line 2 has no path"),
        ("path,label,split\na.jpg,x,test\n", "line 2 has split 'test'; known are train and val"),
        ("path,label\na.jpg,x\n./b/../a.jpg,y\n", r"lists ./b/../a.jpg twice"),
        ("path,label,split\na.jpg,x,train\nd.jpg,y,val\n", "val has class y, which train does not have"),
        ("path,label\na.jpg,x\nb,x\n", "1 of 2 files are not there: b"),
        (
            "path,label\na.jpg,x\n" + "".join(f"{n}.jpg,x\n" for n in range(7)),
            r"7 of 8 files are not there: 0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 2 more. Paths are relative to",
        ),
    ],
)
def test_bad_lists(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(listed(tmp_path, text))


def test_what_is_no_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        open_source(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        open_source(tmp_path)
    (tmp_path / "latin.csv").write_bytes("path,label\nü.jpg,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="not a CSV file in UTF-8"):
        open_source(tmp_path / "latin.csv")
    with pytest.raises(DataError, match="csv needs the file"):
        CsvConfig().open(Inputs())
    with pytest.raises(DataError, match="csv has no use for --devkit"):
        CsvConfig().open(Inputs(tmp_path, devkit=tmp_path))


def test_a_file_that_goes_later(tmp_path: Path) -> None:
    split = open_source(listed(tmp_path, "path,label\na.jpg,x\n")).splits["train"]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        split.read(0)


def test_identity_tells_inputs_apart(tmp_path: Path) -> None:
    text = "path,label\na.jpg,x\nd.jpg,y\n"
    first = open_source(listed(tmp_path, text)).identity
    assert open_source(listed(tmp_path, text)).identity == first
    others = [open_source(listed(tmp_path, other)).identity
              for other in (text.replace("y", "x"), text.replace("d.jpg", "b/c.png"))]  # fmt: skip
    (tmp_path / "a.jpg").write_text("a longer image")
    (tmp_path / "list.csv").write_text(text)
    assert len({str(one) for one in (first, *others, open_source(tmp_path / "list.csv").identity)}) == 4
