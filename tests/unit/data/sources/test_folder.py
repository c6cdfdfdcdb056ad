from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_efficient.data.sources.base import BadImage, Inputs, Source
from vit_efficient.data.sources.folder import FolderConfig
from vit_efficient.errors import DataError

RED = np.zeros((6, 4, 3), np.uint8)
RED[:2] = (255, 0, 0)  # the upper third


def saved(path: Path, kind: str = "PNG", **options: object) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = options.pop("image", Image.fromarray(RED))
    image.save(path, kind, **options)  # type: ignore[attr-defined]
    return path.read_bytes()


def open_source(root: Path) -> Source:
    return FolderConfig().open(Inputs(root))


def test_a_folder_a_class(tmp_path: Path) -> None:
    saved(tmp_path / "cat" / "one.png")
    saved(tmp_path / "cat" / "deep" / "er" / "two.JPG", "JPEG")
    saved(tmp_path / "dog" / "three.webp", "WEBP")
    saved(tmp_path / ".hidden" / "no.png")
    saved(tmp_path / "cat" / ".git" / "no.png")
    saved(tmp_path / "cat" / "._one.png")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"litter")
    (tmp_path / "README.txt").write_text("not an image")
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    split = source.splits["train"]
    assert list(source.splits) == ["train"]
    found = {split.name(i): int(label) for i, label in enumerate(split.labels)}
    assert found == {"cat/one.png": 0, "cat/deep/er/two.JPG": 0, "dog/three.webp": 1}


def test_bytes_are_the_files_own(tmp_path: Path) -> None:
    given = [saved(tmp_path / "c" / "a.png"), saved(tmp_path / "c" / "b.jpeg", "JPEG", quality=70)]
    split = open_source(tmp_path).splits["train"]
    assert [split.read(index).data for index in range(2)] == given
    (tmp_path / "c" / "b.jpeg").unlink()
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        split.read(1)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_train_and_validation_folders(tmp_path: Path, name: str) -> None:
    for file in ("train/cat/1.png", "train/dog/2.png", f"{name}/dog/3.png"):
        saved(tmp_path / file)
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.splits["val"].labels.tolist() == [1]
    saved(tmp_path / name / "emu" / "4.png")
    with pytest.raises(DataError, match=r"class 'emu', which .*train does not have"):
        open_source(tmp_path)


def test_identity_tells_inputs_apart(tmp_path: Path) -> None:
    saved(tmp_path / "c" / "a.png")
    first = open_source(tmp_path).identity
    assert open_source(tmp_path).identity == first
    saved(tmp_path / "c" / "b.png")
    assert open_source(tmp_path).identity != first


def test_what_is_no_set_of_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(DataError, match="needs the folder"):
        FolderConfig().open(Inputs())
    saved(tmp_path / "c" / "a.png")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="d holds no images"):
        open_source(tmp_path)
    saved(tmp_path / "d" / "b.png")
    saved(tmp_path / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies in no class folder"):
        open_source(tmp_path)
