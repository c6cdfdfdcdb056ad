"""Your own images: a folder a class."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

import numpy as np

from vit_efficient.config import Config
from vit_efficient.data.sources.base import BadImage, Inputs, RawImage, Source
from vit_efficient.errors import DataError

VAL_NAMES = ("val", "valid", "validation", "test")
_LITTER = {"thumbs.db", "desktop.ini"}
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


class FolderConfig(Config):
    """Your own images: a folder a class."""

    name: Literal["folder"] = "folder"

    def open(self, inputs: Inputs) -> Source:
        """`PATH/CLASS/**/image`, or `PATH/train/CLASS/...` with `PATH/val/CLASS/...` (or valid, validation, test)."""
        inputs.only(self.name, "path")
        if inputs.path is None:
            raise DataError("folder needs the folder: `python -m vit_efficient.prepare folder PATH --out DIR`.")
        root = inputs.path
        if not root.is_dir():
            raise DataError(f"{root}: there is no such folder.")
        children = {path.name for path in _folders(root)}
        val_name = next((name for name in VAL_NAMES if name in children), None)
        if "train" not in children or val_name is None:
            classes = _class_names(root)
            return Source(self.name, classes, splits := {"train": Folder(root, classes)}, _identity(splits))
        classes = _class_names(root / "train")
        foreign = [path.name for path in _folders(root / val_name) if path.name not in classes]
        if foreign:
            raise DataError(f"{root / val_name} has class {foreign[0]!r}, which {root / 'train'} does not have.")
        splits = {"train": Folder(root / "train", classes), "val": Folder(root / val_name, classes)}
        return Source(self.name, classes, splits, _identity(splits))


class Folder:
    """All files below the class folders; nested folders count for the class, hidden ones do not."""

    def __init__(self, root: Path, class_names: tuple[str, ...]) -> None:
        self.root = root
        stray = [path.name for path in root.iterdir() if path.is_file() and path.suffix.lower() in _IMAGES]
        if stray:
            raise DataError(f"{root / min(stray)} lies in no class folder; move it into one.")
        labels: list[int] = []
        self.files: list[str] = []
        for label, name in enumerate(class_names):
            found = _files(root / name) if (root / name).is_dir() else []
            self.files += found
            labels += [label] * len(found)
        self.labels = np.asarray(labels, np.int64)

    def name(self, index: int) -> str:
        return str(Path(self.files[index]).relative_to(self.root))

    def read(self, index: int) -> RawImage:
        try:
            data = Path(self.files[index]).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        return RawImage(self.name(index), data)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_names(root: Path) -> tuple[str, ...]:
    classes = tuple(path.name for path in _folders(root))
    if not classes:
        raise DataError(f"{root} has no class folders. Expected {root}/CLASS/image.jpg, or train/ and val/ above them.")
    empty = [name for name in classes if not _files(root / name)]
    if empty:
        raise DataError(f"{root / empty[0]} holds no images; every folder is a class. Remove it or fill it.")
    return classes


def _files(folder: Path) -> list[str]:
    found = []
    for parent, children, names in os.walk(folder, followlinks=True):
        children[:] = sorted(name for name in children if not name.startswith("."))
        found += [os.path.join(parent, n) for n in names if not n.startswith(".") and n.lower() not in _LITTER]
    return sorted(found)


def _identity(splits: dict[str, Folder]) -> dict[str, str | int]:
    """Names and sizes of all files: another set of images is told from this one without reading them."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        for index, file in enumerate(split.files):
            digest.update(f"{name}/{split.name(index)}\0{os.path.getsize(file)}\0".encode(errors="surrogateescape"))
    return {"images": sum(len(split.files) for split in splits.values()), "listing": digest.hexdigest()[:32]}
