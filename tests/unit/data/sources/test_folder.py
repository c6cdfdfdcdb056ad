from __future__ import annotations

import io
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


def test_common_formats_stay_byte_for_byte(tmp_path: Path) -> None:
    given = {
        "a.png": saved(tmp_path / "c" / "a.png"),
        "b.jpeg": saved(tmp_path / "c" / "b.jpeg", "JPEG", quality=70),
        "c.webp": saved(tmp_path / "c" / "c.webp", "WEBP"),
        "d.JPEG": saved(tmp_path / "c" / "d.JPEG", "PNG"),  # named wrongly, as one is in ImageNet
        "e.png": saved(tmp_path / "c" / "e.png", image=Image.fromarray(RED[:, :, 0])),
    }
    split = open_source(tmp_path).splits["train"]
    read = [split.read(index) for index in range(5)]
    assert [image.data for image in read] == list(given.values())
    assert [image.extension for image in read] == ["png", "jpg", "webp", "png", "png"]


def test_other_formats_are_converted(tmp_path: Path) -> None:
    for kind in ("BMP", "TIFF", "GIF"):
        saved(tmp_path / "c" / kind, kind)
    saved(tmp_path / "c" / "cmyk.jpg", "JPEG", image=Image.fromarray(RED).convert("CMYK"))
    saved(tmp_path / "c" / "deep.png", image=Image.fromarray((RED[:, :, 0].astype(np.uint16)) * 257))
    split = open_source(tmp_path).splits["train"]
    for index in range(5):
        image = split.read(index)
        decoded = Image.open(io.BytesIO(image.data))
        assert decoded.mode == "RGB"
        assert image.extension == ("jpg" if "cmyk" in image.name else "png")
        assert abs(int(np.asarray(decoded)[0, 0, 0]) - 255) < 12, image.name


def test_a_turned_photograph_is_put_upright(tmp_path: Path) -> None:
    for kind in ("PNG", "JPEG"):
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
        saved(tmp_path / "c" / kind, kind, exif=exif)
    split = open_source(tmp_path).splits["train"]
    for index in range(2):
        decoded = Image.open(io.BytesIO(split.read(index).data)).convert("RGB")
        assert decoded.size == (6, 4)  # 4 x 6 before
        pixels = np.asarray(decoded).astype(int)
        assert pixels[:, -1, 0].min() > 150  # the red edge is at the right now
        assert pixels[:, 0, 0].max() < 100
        assert decoded.getexif().get(0x0112, 1) == 1


def test_bad_images_say_why(tmp_path: Path) -> None:
    whole = saved(tmp_path / "c" / "a.jpg", "JPEG", image=Image.fromarray(np.random.default_rng(0).integers(
        0, 256, (64, 64, 3), dtype=np.uint8)))  # fmt: skip
    (tmp_path / "c" / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c" / "d.txt").write_text("words")
    (tmp_path / "c" / "e.png").write_bytes(b"")
    (tmp_path / "c" / "f.png").symlink_to(tmp_path / "gone.png")
    source_files = FolderConfig()
    (tmp_path / "c" / "f.png").unlink()
    split = source_files.open(Inputs(tmp_path)).splits["train"]
    split.read(0)
    for index, reason in ((1, "truncated"), (2, "not an image"), (3, "not an image")):
        with pytest.raises(BadImage, match=reason):
            split.read(index)
    (tmp_path / "c" / "b.jpg").unlink()
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
