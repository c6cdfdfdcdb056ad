"""The tar archives of ImageNet, listed without unpacking: tars of class tars, and flat ones."""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.sources.spans import Spans
from vit_efficient.errors import DataError


@dataclass(frozen=True)
class Listing:
    """What archives hold, image by image; only headers are read for it.

    Args:
        paths: of the archives.
        wnids: class of each image; all empty for flat archives.
        names: of the images, without folder and ending.
        places: int64 (n, 3): archive, offset and size in bytes.
    """

    paths: tuple[Path, ...]
    wnids: list[str]
    names: list[str]
    places: NDArray[np.int64]

    @property
    def flat(self) -> bool:
        """The archives hold images, not class tars."""
        return not self.wnids[0]

    @property
    def where(self) -> str:
        """The archives, for messages."""
        return ", ".join(str(path) for path in self.paths)

    def split(self, wnids: Sequence[str], class_names: Sequence[str]) -> Spans:
        """The images, given the class of each, one of `class_names`."""
        rank = {wnid: label for label, wnid in enumerate(class_names)}
        labels = np.asarray([rank[wnid] for wnid in wnids], np.int64)
        return Spans(self.paths, self.places, self.names, labels)


def read_listing(paths: Sequence[Path]) -> Listing:
    """List archives of one layout: either class tars (`n01440764.tar` and so on), or images.

    Raises:
        DataError: an archive is absent, damaged, compressed, empty, or not of the layout of the others.
    """
    wnids: list[str] = []
    names: list[str] = []
    places = array("q")  # a list of tuples would take 200 bytes an image
    for number, path in enumerate(paths):
        before = len(names)
        for wnid, name, offset, size in _images(path):
            if wnids and (wnid == "") != (wnids[0] == ""):
                class_tar, image = (wnid, names[0]) if wnid else (wnids[0], name)
                raise DataError(
                    f"{path}: the class tar {class_tar}.tar and the bare image {image}: expected an archive of class "
                    "tars, as the official training archive is, or of images, as the official validation archive is."
                )
            wnids.append(wnid)
            names.append(name)
            places.extend((number, offset, size))
        if len(names) == before:
            raise DataError(f"{path} holds no images.")
    return Listing(tuple(paths), wnids, names, np.asarray(places, np.int64).reshape(-1, 3))


def _images(path: Path) -> Iterator[tuple[str, str, int, int]]:
    """Class (or nothing), name, offset in the file, and bytes of every image."""
    try:
        with tarfile.open(path, mode="r:") as outer:
            for member in outer:
                stem, ending = os.path.splitext(os.path.basename(member.name))
                if not member.isreg():
                    continue
                if ending != ".tar":
                    yield "", stem, member.offset_data, member.size
                    continue
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as class_tar:
                    for image in class_tar:
                        if image.isreg():
                            name = os.path.splitext(os.path.basename(image.name))[0]
                            yield stem, name, member.offset_data + image.offset_data, image.size
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such archive.") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole, uncompressed tar: {error}. Get it again.") from error
