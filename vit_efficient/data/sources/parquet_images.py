"""A column of encoded images in parquet files."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.sources.base import BadImage, Labels, RawImage
from vit_efficient.errors import DataError

_BATCH = 16  # images of which there are Arrow and Python objects at once
_BUFFER = 1 << 20  # bytes read at once, instead of a row group's whole column


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that reads piece by piece, in this thread.

    Raises:
        DataError: it is no parquet file, or damaged where it is read.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a whole parquet file: {error}. Get it again.") from error


class ParquetImages:
    """Rows of several files, numbered through.

    `read` decodes a row group for a single image and keeps the last one, so it is for a few images or for neighbours.
    `scan` reads all in one pass; it holds a page of the column at once, some megabytes in Hugging Face's files.

    Args:
        paths: the files.
        leaf: path of the column of bytes, such as `image.bytes`.
        labels: of all rows.
    """

    def __init__(self, paths: Sequence[Path], leaf: str, labels: Labels) -> None:
        self.paths, self.leaf, self.labels = tuple(paths), leaf, labels
        self.volume = 0
        groups = []  # number of the file, number in the file, first row in the file, rows
        digest = hashlib.sha256(leaf.encode() + labels.tobytes())
        for number, path in enumerate(self.paths):
            with open_parquet(path) as file:
                metadata = file.metadata
            column = [metadata.schema.column(k).path for k in range(metadata.num_columns)].index(leaf)
            first = 0
            for group in range(metadata.num_row_groups):
                part = metadata.row_group(group)
                groups.append((number, group, first, part.num_rows))
                first += part.num_rows
                self.volume += part.column(column).total_uncompressed_size
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode(errors="surrogateescape") + _footer(path))
        self._groups = np.asarray(groups, np.int64).reshape(-1, 4)
        self._starts = np.concatenate([[0], np.cumsum(self._groups[:, 3])])
        self._digest = digest.hexdigest()[:32]
        self._last: tuple[int, Any] | None = None  # a row group's number, and its images

    def name(self, index: int) -> str:
        """File and row, from 0: unlike the paths that some rows have, never the same twice."""
        group = self._group(index)
        file, _, first, _ = self._groups[group].tolist()
        return f"{self.paths[file].stem}/{first + index - int(self._starts[group])}"

    def read(self, index: int) -> RawImage:
        group = self._group(index)
        if self._last is None or self._last[0] != group:
            path, number = self.paths[self._groups[group, 0]], int(self._groups[group, 1])
            with open_parquet(path) as file:
                self._last = (
                    group,
                    _bytes(file.read_row_group(number, columns=[self.leaf], use_threads=False).column(0)),
                )
        data = self._last[1][index - int(self._starts[group])].as_py()
        if data is None:
            raise BadImage("the row has no image")
        return RawImage(self.name(index), data)

    def scan(self, chosen: NDArray[np.bool_]) -> Iterator[bytes | None]:
        """Bytes of the chosen rows, in order."""
        for number, path in enumerate(self.paths):
            mine = np.flatnonzero(self._groups[:, 0] == number).tolist()
            wanted = [(group, chosen[self._starts[group] : self._starts[group + 1]]) for group in mine]
            with open_parquet(path) as file:
                for group, rows in wanted:
                    yield from self._scan_group(file, int(self._groups[group, 1]), rows)

    def _scan_group(self, file: Any, number: int, rows: NDArray[np.bool_]) -> Iterator[bytes | None]:
        if not rows.any():
            return
        done = 0
        for batch in file.iter_batches(_BATCH, row_groups=[number], columns=[self.leaf], use_threads=False):
            column = _bytes(batch.column(0))
            for place in np.flatnonzero(rows[done : done + batch.num_rows]).tolist():
                yield column[place].as_py()
            done += batch.num_rows

    def digest(self) -> str:
        """Of names, sizes and footers, in which sizes and statistics of all columns stand."""
        return self._digest

    def _group(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def _bytes(column: Any) -> Any:
    """The values of a column of bytes, or of structs of which only the field `bytes` was read."""
    from pyarrow import compute, types

    return compute.struct_field(column, "bytes") if types.is_struct(column.type) else column


def _footer(path: Path) -> bytes:
    """The metadata at the end of a file: then their length in 4 bytes, and `PAR1`."""
    with open(path, "rb") as file:
        file.seek(-8, 2)
        (length,) = struct.unpack("<I4x", file.read(8))
        file.seek(-8 - length, 2)
        return file.read(length)
