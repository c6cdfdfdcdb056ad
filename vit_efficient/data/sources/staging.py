"""Images copied out once, for a split that is fast in its own order only.

Parquet keeps images in row groups of a hundred or more, compressed together. Preparation reads in a permutation of the
whole set, so it would have to decompress a row group for nearly every image: a hundred times the work, or all of the
groups in memory. Instead, one pass in the order of the files writes the bytes of the images one after another to a flat
file beside the shards, from which any order is read by position. That takes room on the disk for the images once more
while it lasts, and no memory to speak of.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.files import atomic_writer, make_folder
from vit_efficient.data.sources.base import BadImage, Labels, RawImage, Split, Subset
from vit_efficient.data.sources.spans import OpenFiles
from vit_efficient.errors import DataError

_IMAGES = "images.bin"


@runtime_checkable
class Sequential(Protocol):
    """What such a split offers besides reading single images.

    Args:
        labels: of its images.
        volume: bytes of all images, or about that.
    """

    labels: Labels
    volume: int

    def scan(self, chosen: NDArray[np.bool_]) -> Iterator[bytes | None]:
        """Bytes of the chosen images in order, None for one that has none; memory does not grow with their number."""

    def digest(self) -> str:
        """What tells it from another one."""


class Staged:
    """A split whose bytes are read from the copy.

    Args:
        split: that was copied.
        file: the copy.
        places: int64 (n, 2), offset and size in bytes; a size of -1 says that there is no image.
    """

    def __init__(self, split: Split, file: Path, places: NDArray[np.int64]) -> None:
        self.labels = split.labels
        self._split, self._places = split, places
        self._files = OpenFiles((file,))

    def name(self, index: int) -> str:
        return self._split.name(index)

    def read(self, index: int) -> RawImage:
        offset, size = self._places[index].tolist()
        if size < 0:
            raise BadImage("the row has no image")
        return RawImage(self.name(index), self._files.read(0, offset, size))


@contextmanager
def staged(split: Split, folder: Path, progress: Callable[[int, int], None]) -> Iterator[Split]:
    """The split, in a form that is fast in any order.

    Most splits are that by themselves, and come back as they are. Of others, `folder` holds a copy until the block ends
    well. After a failure or a kill it stays, and the next run goes on with it if it is whole and of the same images.

    Args:
        split: to read.
        folder: for the copy; made where it is needed, then removed with all that is in it.
        progress: told how many images are copied, of how many.

    Raises:
        DataError: there is no room for the copy.
    """
    whole = split.split if isinstance(split, Subset) else split
    if not isinstance(whole, Sequential):
        yield split
        return
    chosen = np.zeros(whole.labels.size, bool)
    chosen[split.indices if isinstance(split, Subset) else slice(None)] = True
    table = folder / f"places-{hashlib.sha256(whole.digest().encode() + chosen.tobytes()).hexdigest()[:32]}.npy"
    if not table.is_file():
        _copy(whole, chosen, table, progress)
    yield Staged(split, folder / _IMAGES, np.load(table))
    shutil.rmtree(folder)


def _copy(split: Sequential, chosen: NDArray[np.bool_], table: Path, progress: Callable[[int, int], None]) -> None:
    """Write the images and then, when they are whole, the table that says so."""
    folder, total = table.parent, int(chosen.sum())
    make_folder(folder)
    for old in folder.iterdir():
        old.unlink()
    needed, free = split.volume * total // max(1, chosen.size), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} must hold a copy of the images while the shards are written, about {needed / 1e9:,.1f} GB, and "
            f"has {free / 1e9:,.1f} GB. Make room, or choose an --out with more of it."
        )
    places = np.full((total, 2), -1, np.int64)
    try:
        with atomic_writer(folder / _IMAGES) as file:
            for number, data in enumerate(split.scan(chosen)):
                if data is not None:
                    places[number] = file.tell(), len(data)
                    file.write(data)
                progress(number + 1, total)
        with atomic_writer(table) as file:
            np.save(file, places)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Mend that, and start this again.") from error
