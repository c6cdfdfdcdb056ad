"""Tiny-ImageNet's zip, which cannot be had here: its layout is imitated exactly, with 3 classes for 200.

Members are stored, as in the official archive or by a person who packed it again, or deflated; the images are the
shared sample's of ImageNet, scaled to 64 x 64, where pixels matter, and noise elsewhere.
"""

from __future__ import annotations

import io
import multiprocessing
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_efficient.data.manifest import read_manifest
from vit_efficient.data.preparation import prepare_source
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.sources.base import BadImage, Inputs, Source, Split
from vit_efficient.data.sources.tiny_imagenet import TinyImagenetConfig
from vit_efficient.errors import DataError

WNIDS = ("n02124075", "n04067472", "n01443537")  # in no order, as the official list is
EACH = 2
VAL = {0: "n01443537", 1: "n04067472", 2: "n02124075", 3: "n01443537"}


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def official() -> dict[str, bytes]:
    """Members as the official archive has them, by their path in it."""
    files = {
        "wnids.txt": "\n".join(WNIDS).encode() + b"\n",
        "words.txt": b"n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\n",
        "val/val_annotations.txt": "".join(f"val_{k}.JPEG\t{w}\t0\t32\t44\t62\n" for k, w in VAL.items()).encode(),
    }
    for number, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"".join(b"%s_%d.JPEG\t0\t10\t63\t58\n" % (wnid.encode(), k)
                                                          for k in range(EACH))  # fmt: skip
        for k in range(EACH):
            files[f"train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(10 * number + k)
    for k in VAL:
        files[f"val/images/val_{k}.JPEG"] = jpeg(100 + k)
        files[f"test/images/test_{k}.JPEG"] = jpeg(200 + k)
    return files


def packed(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("tiny-imagenet-200")
        for name, data in files.items():
            archive.writestr(f"tiny-imagenet-200/{name}", data)
    return path


def open_source(path: Path) -> Source:
    return TinyImagenetConfig().open(Inputs(path))


def contents(split: Split) -> dict[str, tuple[int, bytes]]:
    return {split.name(k): (int(split.labels[k]), split.read(k).data) for k in range(split.labels.size)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_zip_is_read_in_place(tmp_path: Path, method: int) -> None:
    source = open_source(packed(tmp_path / "tiny-imagenet-200.zip", official(), method))
    assert source.class_names == ("n01443537", "n02124075", "n04067472")
    train, val = (contents(source.splits[name]) for name in ("train", "val"))
    assert train == {
        f"{wnid}_{k}.JPEG": (sorted(WNIDS).index(wnid), jpeg(10 * number + k))
        for number, wnid in enumerate(WNIDS) for k in range(EACH)
    }  # fmt: skip
    assert val == {f"val_{k}.JPEG": (sorted(WNIDS).index(wnid), jpeg(100 + k)) for k, wnid in VAL.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]  # nothing was unpacked


def test_several_processes_read_at_once(tmp_path: Path) -> None:
    split = open_source(packed(tmp_path / "t.zip", official())).splits["train"]
    expected = contents(split)  # the file is open now
    assert len(pickle.dumps(split)) < 10_000
    for how in ("fork", "spawn"):
        with multiprocessing.get_context(how).Pool(2) as pool:
            assert pool.map(contents, [split] * 4) == [expected] * 4


def test_damage_is_found(tmp_path: Path) -> None:
    path = packed(tmp_path / "t.zip", official(), zipfile.ZIP_STORED)
    split = open_source(path).splits["train"]
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [split.name(k) for k in range(split.labels.size)]
        at = [next(i.header_offset for i in archive.infolist() if i.filename.endswith(f"/{name}")) for name in names]
    broken = bytearray(whole)
    broken[at[0] + 300] ^= 1  # a bit of an image
    broken[at[1] : at[1] + 4] = b"JUNK"  # where a member begins
    path.write_bytes(broken)
    with pytest.raises(BadImage, match="checksum does not fit"):
        split.read(0)
    with pytest.raises(BadImage, match="no member begins"):
        split.read(1)
    split.read(2)
    packed(path, official())
    split = open_source(path).splits["train"]
    with zipfile.ZipFile(path) as archive:
        at = [next(i.header_offset for i in archive.infolist() if i.filename.endswith(f"/{names[0]}"))]
    broken = bytearray(path.read_bytes())
    broken[at[0] + 120] ^= 255
    path.write_bytes(broken)
    with pytest.raises(BadImage, match="the archive is damaged"):
        split.read(0)


def changed(**files: bytes | None) -> dict[str, bytes]:
    """The official layout with some members replaced, or left out."""
    return {name: data for name, data in {**official(), **files}.items() if data is not None}


NOTES = "val/val_annotations.txt"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b""}, r"has no wnids.txt. Expected tiny-imagenet-200.zip"),
        (changed(**{"wnids.txt": b"\n"}), "wnids.txt is absent or empty"),
        (changed(**{NOTES: None}), "val/val_annotations.txt is absent or empty"),
        (changed(**{"wnids.txt": b"n01443537\nn02124075\n"}), "does not list class n04067472 of train/n04067472"),
        (changed(**{"wnids.txt": "\n".join((*WNIDS, "n09")).encode()}), "no training images of class n09"),
        (changed(**{"val/images/val_2.JPEG": None}), "val/images/val_2.JPEG has no image"),
        (changed(**{"val/images/val_7.JPEG": jpeg(1)}), "val/images/val_7.JPEG has no label"),
        (changed(**{NOTES: official()[NOTES] + b"val_4.JPEG\tn09\t0\t0\t1\t1\n"}), "line 5 of val/val_annotations.txt"),
        (changed(**{NOTES: official()[NOTES] + b"val_4.JPEG n01443537\n"}), "line 5 .* with tabs between them"),
        (changed(**{NOTES: official()[NOTES] * 2}), "line 5 of .* an image, named once"),
    ],
)
def test_archives_that_do_not_fit(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(packed(tmp_path / "t.zip", files))


def test_what_is_no_plain_zip(tmp_path: Path) -> None:
    whole = packed(tmp_path / "t.zip", official()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole zip"):
        open_source(tmp_path / "cut.zip")
    with pytest.raises(DataError, match="no such archive"):
        open_source(tmp_path / "absent.zip")
    with pytest.raises(DataError, match="is a folder; the zip itself is read"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"_0.JPEG is compressed by method 12"):
        open_source(packed(tmp_path / "bz.zip", official(), zipfile.ZIP_BZIP2))
    with pytest.raises(DataError, match="tiny_imagenet needs its archive"):
        TinyImagenetConfig().open(Inputs())
    with pytest.raises(DataError, match="no use for --val"):
        TinyImagenetConfig().open(Inputs(tmp_path, val=(tmp_path,)))


def test_identity_tells_inputs_apart(tmp_path: Path) -> None:
    first = open_source(packed(tmp_path / "a.zip", official())).identity
    assert open_source(packed(tmp_path / "b.zip", official())).identity == first
    swapped = official()[NOTES].replace(b"n04067472", b"n02124075")
    others = [open_source(packed(tmp_path / "c.zip", changed(**more))).identity
              for more in ({NOTES: swapped}, {f"train/{WNIDS[0]}/images/{WNIDS[0]}_9.JPEG": jpeg(3)})]  # fmt: skip
    assert len({str(identity) for identity in (first, *others)}) == 3


def test_zip_to_shards(tmp_path: Path, photographs: list[tuple[str, bytes]]) -> None:
    """Real images in the imitated zip: what comes out of the shards are those images with their classes."""

    def small(data: bytes) -> bytes:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").resize((64, 64)).save(buffer, "JPEG")
        return buffer.getvalue()

    images = [(wnid, small(data)) for wnid, data in photographs]
    files = {"wnids.txt": "\n".join(wnid for wnid, _ in images).encode()}
    files |= {f"train/{wnid}/images/{wnid}_0.JPEG": data for wnid, data in images}
    files |= {f"val/images/val_{k}.JPEG": data for k, (_, data) in enumerate(images)}
    files[NOTES] = "".join(f"val_{k}.JPEG\t{wnid}\t0\t0\t63\t63\n" for k, (wnid, _) in enumerate(images)).encode()
    prepare_source(open_source(packed(tmp_path / "t.zip", files)), tmp_path / "out")
    for split in ("train", "val"):
        manifest = read_manifest(tmp_path / "out" / split)
        with ShardReader(ShardSet(tmp_path / "out" / split, manifest), 12) as reader:
            samples = [reader.read(0, number) for number in range(12)]
        assert {(manifest.class_names[one.label], one.image) for one in samples} == set(images)
