"""ImageNet-1k, from the official archives, which are read in place and never unpacked."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vit_efficient.config import Config
from vit_efficient.data.encode import checked
from vit_efficient.data.files import read_span
from vit_efficient.data.sources.base import BadImage, Inputs, Labels, RawImage, Source
from vit_efficient.errors import DataError


class ImagenetConfig(Config):
    """ImageNet-1k, from the official archives."""

    name: Literal["imagenet"] = "imagenet"

    def open(self, inputs: Inputs) -> Source:
        """A tar of class tars for training, and one or more of the same layout for validation."""
        if inputs.train is None or inputs.path is not None:
            raise DataError(
                "imagenet needs its archive: `python -m vit_efficient.prepare imagenet --train "
                "ILSVRC2012_img_train.tar --out DIR` (and --val TAR for validation images)."
            )
        train = ClassTars((inputs.train,))
        splits = {"train": train}
        if inputs.val:
            val = splits["val"] = ClassTars(inputs.val)
            val.use_classes(train.class_names)
        sizes = {path.name: path.stat().st_size for path in (inputs.train, *inputs.val)}
        return Source(self.name, train.class_names, splits, {"archives": sizes})


class ClassTars:
    """Images in tars of class tars (`n01440764.tar` ...), by their byte offset in the outer file.

    Only headers are read to open them: offsets, sizes and labels stay in memory, 24 bytes an image and its name.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self.paths = paths
        classes: list[str] = []
        names: list[str] = []
        rows: list[tuple[int, int, int, int]] = []  # archive, offset, bytes, number in `classes`
        for number, path in enumerate(paths):
            for wnid, name, offset, size in _members(path):
                if not classes or classes[-1] != wnid:
                    classes.append(wnid)
                names.append(name)
                rows.append((number, offset, size, len(classes) - 1))
        self.class_names = tuple(sorted(set(classes)))
        self._places: NDArray[np.int64] = np.asarray(rows, np.int64).reshape(-1, 4)
        self._names = np.asarray(names, np.bytes_)
        rank = {wnid: label for label, wnid in enumerate(self.class_names)}
        self.labels: Labels = np.asarray([rank[wnid] for wnid in classes], np.int64)[self._places[:, 3]]
        self._files: dict[int, int] = {}

    def use_classes(self, class_names: tuple[str, ...]) -> None:
        """Number the classes as the training set does.

        Raises:
            DataError: a class that training does not have.
        """
        rank = {wnid: label for label, wnid in enumerate(class_names)}
        foreign = [wnid for wnid in self.class_names if wnid not in rank]
        if foreign:
            raise DataError(f"{self.paths[0]} has class {foreign[0]}, which the training archive does not have.")
        self.labels = np.asarray([rank[wnid] for wnid in self.class_names], np.int64)[self.labels]
        self.class_names = class_names

    def name(self, index: int) -> str:
        return self._names[index].decode()

    def read(self, index: int) -> RawImage:
        archive, offset, size, _ = self._places[index].tolist()
        if archive not in self._files:
            self._files[archive] = os.open(self.paths[archive], os.O_RDONLY)
        data = read_span(self._files[archive], offset, size)
        if len(data) != size:
            raise BadImage(f"{self.paths[archive]} ends before it")
        return RawImage(self.name(index), *checked(data))


def _members(path: Path) -> list[tuple[str, str, int, int]]:
    """(class, image name, offset in the outer file, bytes) of every image."""
    found = []
    try:
        with tarfile.open(path, mode="r:") as outer:
            for class_tar in outer:
                if not class_tar.isreg():
                    continue
                wnid, ending = os.path.splitext(os.path.basename(class_tar.name))
                reader = outer.extractfile(class_tar)
                if ending != ".tar" or reader is None:
                    raise DataError(
                        f"{path}: {class_tar.name} is not a class tar; the official training archive is a "
                        "tar of tars, n01440764.tar and so on."
                    )
                with tarfile.open(fileobj=reader, mode="r:") as inner:
                    for member in inner:
                        if member.isreg():
                            name = os.path.splitext(os.path.basename(member.name))[0]
                            found.append((wnid, name, class_tar.offset_data + member.offset_data, member.size))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such archive.") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole, uncompressed tar: {error}. Get it again.") from error
    if not found:
        raise DataError(f"{path} holds no images.")
    return found
