"""Tiny-ImageNet: 200 classes, 64 x 64 pixels, from its zip, which is read in place."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from vit_efficient.config import Config
from vit_efficient.data.sources.base import Inputs, Source
from vit_efficient.data.sources.classes import some
from vit_efficient.data.sources.zipped import ZipImages
from vit_efficient.errors import DataError

_CLASSES, _ANNOTATIONS = "wnids.txt", "val/val_annotations.txt"


class TinyImagenetConfig(Config):
    """Tiny-ImageNet, from its zip."""

    name: Literal["tiny_imagenet"] = "tiny_imagenet"

    def open(self, inputs: Inputs) -> Source:
        """`tiny-imagenet-200.zip`: its training images, and its validation images as `val_annotations.txt` labels them.

        Classes are named by their WordNet id and numbered in its order, as those of ImageNet are. The images of `test/`
        have no labels and are left alone, and so are the boxes and the words for the ids.
        """
        inputs.only(self.name, "path")
        if inputs.path is None:
            raise DataError(
                "tiny_imagenet needs its archive: "
                "`python -m vit_efficient.prepare tiny_imagenet tiny-imagenet-200.zip --out DIR`."
            )
        archive = _Archive(inputs.path)
        classes = tuple(sorted(set(archive.lines(_CLASSES))))
        splits = {"train": _train(archive, classes), "val": _val(archive, classes)}
        identity = {name: {"images": split.labels.size, "listing": split.digest()} for name, split in splits.items()}
        return Source(self.name, classes, splits, identity)


class _Archive:
    """The zip's table of members, by their path below `tiny-imagenet-200/`, and its text files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            raise DataError(
                f"{path} is a folder; the zip itself is read. To make one again: zip -0 -r {path}.zip {path}"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                members = [one for one in archive.infolist() if not one.is_dir()]
                top = next((one.filename for one in members if one.filename.rsplit("/")[-1] == _CLASSES), None)
                if top is None:
                    raise DataError(f"{path} has no {_CLASSES}. Expected tiny-imagenet-200.zip.")
                prefix = top.removesuffix(_CLASSES)
                self.members = {one.filename.removeprefix(prefix): one for one in members}
                texts = [name for name in (_CLASSES, _ANNOTATIONS) if name in self.members]
                self._texts = {name: archive.read(self.members[name]) for name in texts}
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such archive.") from None
        except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{path} is not a whole zip archive: {error}. Get it again.") from error

    def lines(self, name: str) -> list[str]:
        lines = self._texts.get(name, b"").decode("utf-8", errors="replace").splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise DataError(f"{self.path}: {name} is absent or empty. Get the archive again.")
        return found

    def images(self, labels: dict[str, int]) -> ZipImages:
        """Members with their labels, in the order of their names."""
        names = sorted(labels)
        return ZipImages(
            self.path, [self.members[name] for name in names], np.asarray([labels[name] for name in names], np.int64)
        )


def _train(archive: _Archive, classes: tuple[str, ...]) -> ZipImages:
    rank = {wnid: label for label, wnid in enumerate(classes)}
    labels = {}
    for name in archive.members:
        match = re.fullmatch(r"train/([^/]+)/images/[^/]+\.JPEG", name)
        if match:
            if match[1] not in rank:
                raise DataError(f"{archive.path}: {_CLASSES} does not list class {match[1]} of {name}.")
            labels[name] = rank[match[1]]
    absent = sorted(rank.keys() - {classes[label] for label in labels.values()})
    if absent:
        raise DataError(f"{archive.path}: no training images of class {some(absent)}. Get the archive again.")
    return archive.images(labels)


def _val(archive: _Archive, classes: tuple[str, ...]) -> ZipImages:
    rank = {wnid: label for label, wnid in enumerate(classes)}
    labels: dict[str, int] = {}
    for number, line in enumerate(archive.lines(_ANNOTATIONS), 1):
        image, wnid, *_ = *line.split("\t"), ""  # and the box: left, top, right, bottom
        name = f"val/images/{image}"
        if wnid not in rank or name in labels:
            raise DataError(
                f"{archive.path}: line {number} of {_ANNOTATIONS} is {line!r}; expected an image, named once, and a "
                f"class of {_CLASSES}, with tabs between them."
            )
        labels[name] = rank[wnid]
    there = {name for name in archive.members if re.fullmatch(r"val/images/[^/]+\.JPEG", name)}
    for what, names in (
        ("has no image", sorted(labels.keys() - there)),
        ("has no label", sorted(there - labels.keys())),
    ):
        if names:
            raise DataError(f"{archive.path}: {some(names)} {what}. Get the archive again.")
    return archive.images(labels)
