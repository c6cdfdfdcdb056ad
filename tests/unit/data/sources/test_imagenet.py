"""The official layouts of ImageNet: a tar of class tars, and the flat validation tar with the development kit.

The validation tar and the kit cannot be had here; they are imitated exactly, filled with real images of the shared
sample of the training archive where pixels matter, and with noise elsewhere. In the kit, `meta.mat` is a real MATLAB 5
file with the fields and the nesting of the official one, 1,860 synsets cut down to a few.
"""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from vit_efficient.data.manifest import read_manifest
from vit_efficient.data.preparation import Options, prepare_source
from vit_efficient.data.reader import ShardReader
from vit_efficient.data.shard_set import ShardSet
from vit_efficient.data.sources.base import BadImage, Inputs, Source
from vit_efficient.data.sources.imagenet import ImagenetConfig
from vit_efficient.errors import DataError

TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
WNIDS = ("n01", "n02", "n03")
NUMBERS = {"n03": 1, "n01": 2, "n02": 3}  # ILSVRC2012_ID is not in the order of the WordNet ids


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def class_tars(path: Path, classes: dict[str, int]) -> Path:
    members = {
        f"{wnid}.tar": tar({f"{wnid}_{n}.JPEG": jpeg(n) for n in range(count)}) for wnid, count in classes.items()
    }
    path.write_bytes(tar(members))
    return path


def training(tmp_path: Path) -> Path:
    return class_tars(tmp_path / "ILSVRC2012_img_train.tar", dict.fromkeys(WNIDS, 1))


def flat(tmp_path: Path, images: list[bytes]) -> Path:
    path = tmp_path / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar({f"ILSVRC2012_val_{k:08d}.JPEG": data for k, data in enumerate(images, 1)}))
    return path


def meta(numbers: dict[str, int]) -> bytes:
    """`synsets` as the kit has it: a column of structs, classes first, then synsets that have children."""
    kind = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
                                        "wordnet_height", "num_train_images")]  # fmt: skip
    leaves = sorted(numbers, key=numbers.__getitem__)
    rows = [(numbers[w], w, "a thing, a what", "of some kind", 0, np.zeros((0, 0)), 0, 1300) for w in leaves]
    parent = len(rows) + 1
    rows.append((parent, "n00001740", "entity", "all", len(rows), np.arange(1, parent), 1, 0))
    synsets = np.empty((len(rows), 1), kind)
    for place, row in enumerate(rows):
        synsets[place, 0] = tuple(np.float64(cell) if isinstance(cell, int) else cell for cell in row)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, format="5")
    return buffer.getvalue()


def devkit(tmp_path: Path, wnids: list[str], numbers: dict[str, int] | None = None, **replaced: bytes) -> Path:
    """The kit, for validation images of these classes."""
    numbers = numbers or NUMBERS
    files = {
        META: meta(numbers),
        TRUTH: "".join(f"{numbers[wnid]}\n" for wnid in wnids).encode(),
        "ILSVRC2012_devkit_t12/readme.txt": b"words",
    }
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(gzip.compress(tar({name: replaced.get(Path(name).stem, data) for name, data in files.items()})))
    return path


def open_source(train: Path, *val: Path, **more: Path) -> Source:
    return ImagenetConfig().open(Inputs(train=train, val=val, **more))  # type: ignore[arg-type]


def test_class_tars_are_read_in_place(tmp_path: Path) -> None:
    source = open_source(class_tars(tmp_path / "train.tar", {"n02": 2, "n01": 3}))
    assert source.class_names == ("n01", "n02")  # sorted, whatever the archive's order
    split = pickle.loads(pickle.dumps(source.splits["train"]))
    assert split.labels.tolist() == [1, 1, 0, 0, 0]
    for index, (name, seed) in enumerate([("n02_0", 0), ("n02_1", 1), ("n01_0", 0), ("n01_1", 1), ("n01_2", 2)]):
        image = split.read(index)
        assert (image.name, image.data) == (name, jpeg(seed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.tar"]  # nothing was unpacked


def test_validation_may_be_class_tars(tmp_path: Path) -> None:
    train = training(tmp_path)
    source = open_source(train, class_tars(tmp_path / "a.tar", {"n03": 2}), class_tars(tmp_path / "b.tar", {"n01": 1}))
    assert source.splits["val"].labels.tolist() == [2, 2, 0]
    assert source.splits["val"].read(2).data == jpeg(0)
    with pytest.raises(DataError, match="class n09, which the training archive does not have"):
        open_source(train, class_tars(tmp_path / "c.tar", {"n09": 1}))
    with pytest.raises(DataError, match="leave out --devkit"):
        open_source(train, tmp_path / "a.tar", devkit=devkit(tmp_path, ["n01"]))


def test_validation_with_the_devkit(tmp_path: Path) -> None:
    wnids = ["n02", "n01", "n03", "n03", "n01"]
    kit = devkit(tmp_path, wnids)
    val = flat(tmp_path, [jpeg(k) for k in range(5)])
    source = open_source(training(tmp_path), val, devkit=kit)
    split = source.splits["val"]
    assert [source.class_names[label] for label in split.labels] == wnids
    for index in range(5):
        image = split.read(index)
        assert (image.name, image.data) == (f"ILSVRC2012_val_{index + 1:08d}", jpeg(index))
    with tarfile.open(kit) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = open_source(training(tmp_path), val, devkit=tmp_path / "ILSVRC2012_devkit_t12")
    assert unpacked.splits["val"].labels.tolist() == split.labels.tolist()
    assert unpacked.identity == source.identity


def test_the_archives_order_does_not_matter(tmp_path: Path) -> None:
    """The ground truth goes by the number in the name."""
    val = tmp_path / "val.tar"
    val.write_bytes(tar({f"val/ILSVRC2012_val_{k:08d}.JPEG": jpeg(k) for k in (3, 1, 2)}))
    split = open_source(training(tmp_path), val, devkit=devkit(tmp_path, ["n02", "n01", "n03"])).splits["val"]
    assert {split.name(i)[-1]: int(split.labels[i]) for i in range(3)} == {"1": 1, "2": 0, "3": 2}
    assert split.read(0).data == jpeg(3)


TABLES = {
    "kaggle": "ImageId,PredictionString\nILSVRC2012_val_00000002,n02 85 1 499 272 \n"
    "ILSVRC2012_val_00000001,n03 1 2 3 4 n03 5 6 7 8 \n",
    "filename": "filename,synset\nILSVRC2012_val_00000001.JPEG,n03\nILSVRC2012_val_00000002.JPEG,n02\n",
    "other way round": "wnid, image\nn03, val/ILSVRC2012_val_00000001.JPEG\nn02, ILSVRC2012_val_00000002.JPEG\n",
    "no header": "ILSVRC2012_val_00000001.JPEG,n03\r\nILSVRC2012_val_00000002.JPEG,n02\r\n",
    "one column": "n03\nn02\n",
    "one column with a header": "synset\nn03\nn02\n\n",
    "byte order mark": "\ufefffilename,synset\nILSVRC2012_val_00000001.JPEG,n03\nILSVRC2012_val_00000002.JPEG,n02\n",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_validation_with_a_table(tmp_path: Path, table: str) -> None:
    (tmp_path / "labels.csv").write_text(table, newline="")
    val = flat(tmp_path, [jpeg(1), jpeg(2)])
    split = open_source(training(tmp_path), val, labels=tmp_path / "labels.csv").splits["val"]
    assert {split.name(i): int(split.labels[i]) for i in range(2)} == {
        "ILSVRC2012_val_00000001": 2, "ILSVRC2012_val_00000002": 1,
    }  # fmt: skip


BAD_TABLES = [
    ("", "is empty"),
    ("filename,synset\na.JPEG,7\n", "line 2 is 'a.JPEG,7'; expected an image and a WordNet id"),
    ("filename,synset\na.JPEG\n", "line 2 is 'a.JPEG'"),
    ("filename,synset\na.JPEG,n01\na.png,n02\n", "line 3 names a a second time"),
    ("photo,synset\na.JPEG,n01\n", "no column of images among photo, synset"),
    ("filename,synset\nILSVRC2012_val_00000001,n01\n", "ILSVRC2012_val_00000002 has no label"),
    ("n01\nn01\nn02\nn01\n", "2 images in .*, 4 labels in .*00000003, .*00000004 has a label and no image"),
    ("n01\nn77\n", "labels.csv has class n77, which the training archive does not have"),
]


@pytest.mark.parametrize(("table", "message"), BAD_TABLES)
def test_tables_that_do_not_fit(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_source(training(tmp_path), flat(tmp_path, [jpeg(1), jpeg(2)]), labels=tmp_path / "labels.csv")


def test_tables_that_are_none(tmp_path: Path) -> None:
    train, val = training(tmp_path), flat(tmp_path, [jpeg(1)])
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a CSV file"):
        open_source(train, val, labels=tmp_path / "x.csv")
    with pytest.raises(DataError, match="no such file"):
        open_source(train, val, labels=tmp_path / "absent.csv")


BAD_KITS: list[tuple[dict[str, Any], str]] = [
    ({"wnids": ["n01"] * 2}, r"3 images in .*, 2 labels in .*: ILSVRC2012_val_00000003 has no label"),
    ({"wnids": ["n01"] * 9}, r"9 labels in .*00000008 and 1 more has a label and no image"),
    (
        {"wnids": ["n01", "n09", "n01"], "numbers": {**NUMBERS, "n09": 4}},
        "tar.gz has class n09, which the training",
    ),
    ({"wnids": [], "ILSVRC2012_validation_ground_truth": b"1\nx\n3\n"}, "line 2 of ILSVRC2012_val.* is 'x'"),
    ({"wnids": [], "ILSVRC2012_validation_ground_truth": b"1\n4\n3\n"}, "line 2 of .* is '4', which .* its 3 classes"),
    ({"wnids": ["n01"] * 3, "meta": b"MATLAB"}, "meta.mat is not the kit's table of synsets"),
    ({"wnids": ["n01"] * 3, "meta": meta(NUMBERS)[:400]}, "meta.mat is not the kit's table of synsets"),
]


@pytest.mark.parametrize(("kit", "message"), BAD_KITS)
def test_kits_that_do_not_fit(tmp_path: Path, kit: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(training(tmp_path), flat(tmp_path, [jpeg(k) for k in range(3)]), devkit=devkit(tmp_path, **kit))


def test_kits_that_are_none(tmp_path: Path) -> None:
    train, val = training(tmp_path), flat(tmp_path, [jpeg(1)])
    cut = devkit(tmp_path, ["n01"])
    cut.write_bytes(cut.read_bytes()[:300])
    with pytest.raises(DataError, match="not a whole tar archive"):
        open_source(train, val, devkit=cut)
    with pytest.raises(DataError, match=r"has no meta.mat. Expected ILSVRC2012_devkit_t12.tar.gz"):
        open_source(train, val, devkit=train)
    with pytest.raises(DataError, match="no such archive or folder"):
        open_source(train, val, devkit=tmp_path / "absent.tar.gz")


def test_labels_are_asked_for(tmp_path: Path) -> None:
    train, val, kit = training(tmp_path), flat(tmp_path, [jpeg(1)]), devkit(tmp_path, ["n01"])
    with pytest.raises(DataError, match=r"does not say what its images are.*--devkit ILSVRC.*--labels LOC_val"):
        open_source(train, val)
    with pytest.raises(DataError, match="name one of them"):
        open_source(train, val, devkit=kit, labels=kit)
    with pytest.raises(DataError, match="name their archive with --val"):
        open_source(train, devkit=kit)


def test_an_image_twice(tmp_path: Path) -> None:
    flat(tmp_path, [jpeg(1)])
    twice = flat(tmp_path, [jpeg(1)]).rename(tmp_path / "other.tar")
    with pytest.raises(DataError, match="has ILSVRC2012_val_00000001 twice"):
        open_source(training(tmp_path), twice, flat(tmp_path, [jpeg(1)]), devkit=devkit(tmp_path, ["n01"]))


def test_identity_tells_inputs_apart(tmp_path: Path) -> None:
    train, val = training(tmp_path), flat(tmp_path, [jpeg(1), jpeg(2)])
    first = open_source(train, val, devkit=devkit(tmp_path, ["n01", "n02"])).identity
    assert open_source(train, val, devkit=devkit(tmp_path, ["n01", "n02"])).identity == first
    others = [
        open_source(train, val, devkit=devkit(tmp_path, ["n02", "n01"])).identity,  # other labels
        open_source(train).identity,
        open_source(class_tars(tmp_path / "t.tar", {"n01": 1, "n02": 1, "n03": 2})).identity,
    ]
    assert len({str(identity) for identity in (first, *others)}) == 4


def test_what_is_not_the_official_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000001 is not a class tar"):
        open_source(flat(tmp_path, [jpeg(0)]))
    mixed = tmp_path / "mixed.tar"
    for members in ({"n01.tar": tar({"a.JPEG": jpeg(0)}), "b.JPEG": jpeg(1)},
                    {"b.JPEG": jpeg(1), "n01.tar": tar({"a.JPEG": jpeg(0)})}):  # fmt: skip
        mixed.write_bytes(tar(members))
        with pytest.raises(DataError, match=r"the class tar n01\.tar and the bare image b"):
            open_source(mixed)
    whole = class_tars(tmp_path / "train.tar", {"n01": 2, "n02": 2}).read_bytes()
    for cut in (3000, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="not a whole, uncompressed tar"):
            open_source(tmp_path / "cut.tar")
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="not a whole, uncompressed tar"):
        open_source(tmp_path / "t.tar.gz")
    (tmp_path / "empty.tar").write_bytes(tar({}))
    with pytest.raises(DataError, match="holds no images"):
        open_source(tmp_path / "empty.tar")
    with pytest.raises(DataError, match="no such archive"):
        open_source(tmp_path / "absent.tar")
    with pytest.raises(DataError, match="--train"):
        ImagenetConfig().open(Inputs())
    with pytest.raises(DataError, match="imagenet has no use for PATH"):
        ImagenetConfig().open(Inputs(path=tmp_path))


def test_an_archive_that_shrinks_or_goes(tmp_path: Path) -> None:
    path = class_tars(tmp_path / "train.tar", {"n01": 1})
    split, other = (open_source(path).splits["train"] for _ in range(2))
    path.write_bytes(path.read_bytes()[:1600])
    with pytest.raises(BadImage, match="ends before it"):
        split.read(0)
    path.unlink()
    with pytest.raises(DataError, match="cannot be opened: No such file"):
        other.read(0)


def test_the_sample_of_the_training_archive(shared: Callable[[str], Path]) -> None:
    path = shared("data/ILSVRC2012_sample_train.tar")
    source = open_source(path)
    split = source.splits["train"]
    assert len(source.class_names) == split.labels.size == 1000
    with tarfile.open(path) as archive:
        for number, member in enumerate(archive):
            if number % 100 == 0:
                with tarfile.open(fileobj=archive.extractfile(member)) as class_tar:
                    image = class_tar.next()
                    assert image is not None
                    expected = class_tar.extractfile(image)
                    assert expected is not None
                    assert split.read(number).data == expected.read()


def test_archives_to_shards(tmp_path: Path, photographs: list[tuple[str, bytes]]) -> None:
    """Imitated validation tar and kit, real images: the shards hold those images with their classes."""
    train = tmp_path / "ILSVRC2012_img_train.tar"
    train.write_bytes(tar({f"{wnid}.tar": tar({f"{wnid}_1.JPEG": data}) for wnid, data in photographs}))
    shuffled = [photographs[k] for k in np.random.default_rng(0).permutation(12)]
    numbers = {wnid: number for number, (wnid, _) in enumerate(reversed(photographs), 1)}
    val = flat(tmp_path, [data for _, data in shuffled])
    kit = devkit(tmp_path, [wnid for wnid, _ in shuffled], numbers)
    prepare_source(open_source(train, val, devkit=kit), tmp_path / "out", Options())
    for split in ("train", "val"):
        manifest = read_manifest(tmp_path / "out" / split)
        assert manifest.class_names == tuple(wnid for wnid, _ in photographs)
        with ShardReader(ShardSet(tmp_path / "out" / split, manifest), 12) as reader:
            samples = [reader.read(0, number) for number in range(12)]
        assert {(manifest.class_names[one.label], one.image) for one in samples} == set(photographs)
