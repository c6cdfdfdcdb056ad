"""Images that lie side by side in a few large files, read in place by their position."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.files import read_span
from vit_efficient.data.sources.base import BadImage, Labels, RawImage
from vit_efficient.errors import DataError


class OpenFiles:
    """Files to read from by position. Each process opens them for itself, when it first reads one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._open: dict[int, int] = {}

    def read(self, file: int, offset: int, size: int) -> bytes:
        """So many bytes of one of the files.

        Raises:
            BadImage: they cannot be read.
            DataError: the file cannot be opened.
        """
        try:
            data = read_span(self._descriptor(file), offset, size)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise BadImage(f"{self.paths[file]} ends before it")
        return data

    def _descriptor(self, file: int) -> int:
        if file not in self._open:
            try:
                self._open[file] = os.open(self.paths[file], os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{self.paths[file]} cannot be opened: {error.strerror}.") from error
        return self._open[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class Spans:
    """A split whose images are spans of a few files.

    Positions, labels and names are arrays, so that a million images take tens of megabytes.

    Args:
        paths: the files.
        places: int64 (n, 3): number of the file, offset and size in bytes, image by image.
        names: of the images.
        labels: of the images.
    """

    def __init__(self, paths: Sequence[Path], places: NDArray[np.int64], names: Sequence[str], labels: Labels) -> None:
        self.files = OpenFiles(paths)
        self.places = places
        self.labels = labels
        self._names = np.asarray([name.encode(errors="surrogateescape") for name in names], np.bytes_)

    def name(self, index: int) -> str:
        return bytes(self._names[index]).decode(errors="surrogateescape")

    def read(self, index: int) -> RawImage:
        return RawImage(self.name(index), self.files.read(*self.places[index].tolist()))

    def digest(self) -> str:
        """Of names, sizes and labels: tells another set of images from this one without reading them."""
        digest = hashlib.sha256()
        for array in (self._names, self.places[:, 2], self.labels):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:32]
