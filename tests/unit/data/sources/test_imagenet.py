"""The official layout, a tar of class tars, imitated with a few images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_efficient.data.sources.base import BadImage, Inputs, Source
from vit_efficient.data.sources.imagenet import ImagenetConfig
from vit_efficient.errors import DataError


def jpeg(seed: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def archive(path: Path, classes: dict[str, int]) -> Path:
    members = {
        f"{wnid}.tar": tar({f"{wnid}_{n}.JPEG": jpeg(n) for n in range(count)}) for wnid, count in classes.items()
    }
    path.write_bytes(tar(members))
    return path


def open_source(*paths: Path) -> Source:
    return ImagenetConfig().open(Inputs(train=paths[0], val=paths[1:]))


def test_class_tars_are_read_in_place(tmp_path: Path) -> None:
    source = open_source(archive(tmp_path / "train.tar", {"n02": 2, "n01": 3}))
    assert source.class_names == ("n01", "n02")  # sorted, whatever the archive's order
    split = source.splits["train"]
    assert split.labels.tolist() == [1, 1, 0, 0, 0]
    for index, (name, seed) in enumerate([("n02_0", 0), ("n02_1", 1), ("n01_0", 0), ("n01_1", 1), ("n01_2", 2)]):
        image = split.read(index)
        assert (image.name, image.data, image.extension) == (name, jpeg(seed), "jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.tar"]  # nothing was unpacked


def test_validation_follows_the_training_classes(tmp_path: Path) -> None:
    train = archive(tmp_path / "train.tar", {"n01": 1, "n02": 1, "n03": 1})
    source = open_source(train, archive(tmp_path / "a.tar", {"n03": 2}), archive(tmp_path / "b.tar", {"n01": 1}))
    assert source.splits["val"].labels.tolist() == [2, 2, 0]
    assert source.splits["val"].read(2).data == jpeg(0)
    with pytest.raises(DataError, match="class n09, which the training archive does not have"):
        open_source(train, archive(tmp_path / "c.tar", {"n09": 1}))


def test_odd_images(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (3, 3)).save(png, "PNG")
    odd = {"a.JPEG": png.getvalue(), "b.JPEG": jpeg(0, "CMYK"), "c.JPEG": jpeg(0)[:-100]}
    (tmp_path / "t.tar").write_bytes(tar({"n01.tar": tar(odd)}))
    split = open_source(tmp_path / "t.tar").splits["train"]
    assert split.read(0).extension == "png"
    converted = split.read(1)
    assert Image.open(io.BytesIO(converted.data)).mode == "RGB"
    with pytest.raises(BadImage):
        split.read(2)


def test_what_is_not_the_official_archive(tmp_path: Path) -> None:
    flat = tmp_path / "flat.tar"
    flat.write_bytes(tar({"ILSVRC2012_val_00000001.JPEG": jpeg(0)}))
    with pytest.raises(DataError, match="not a class tar"):
        open_source(flat)
    whole = archive(tmp_path / "train.tar", {"n01": 2, "n02": 2}).read_bytes()
    for cut in (3000, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="not a whole, uncompressed tar"):
            open_source(tmp_path / "cut.tar")
    (tmp_path / "empty.tar").write_bytes(tar({}))
    with pytest.raises(DataError, match="holds no images"):
        open_source(tmp_path / "empty.tar")
    with pytest.raises(DataError, match="no such archive"):
        open_source(tmp_path / "absent.tar")
    with pytest.raises(DataError, match="--train"):
        ImagenetConfig().open(Inputs(path=tmp_path))
