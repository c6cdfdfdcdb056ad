"""Images in a zip archive, read in place."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_efficient.data.sources.base import BadImage, Labels, RawImage
from vit_efficient.data.sources.spans import Spans
from vit_efficient.errors import DataError

_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, ..., lengths of the name and of the extra field
_ENCRYPTED = 0x1


class ZipImages(Spans):
    """Members of a zip, each found by its position and inflated by itself.

    `zipfile` would read the whole table of members in every process: 100 MB and a second for Tiny-ImageNet's 120,000.
    Here the table is read once, and a few numbers a member are kept.

    Args:
        path: of the archive.
        members: its images, stored or deflated; named without their folder.
        labels: of the images.

    Raises:
        DataError: a member is encrypted, or compressed in another way.
    """

    def __init__(self, path: Path, members: Sequence[zipfile.ZipInfo], labels: Labels) -> None:
        for one in members:
            if one.flag_bits & _ENCRYPTED or one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                how = "encrypted" if one.flag_bits & _ENCRYPTED else f"compressed by method {one.compress_type}"
                raise DataError(f"{path}: {one.filename} is {how}. Pack the images plainly: zip -0 -r.")
        places = np.asarray([(0, one.header_offset, one.compress_size) for one in members], np.int64)
        names = [one.filename.rsplit("/", 1)[-1] for one in members]
        super().__init__((path,), places.reshape(-1, 3), names, labels)
        self._deflated = np.asarray([one.compress_type == zipfile.ZIP_DEFLATED for one in members])
        self._checksums = np.asarray([one.CRC for one in members], np.uint32)

    def read(self, index: int) -> RawImage:
        file, offset, size = self.places[index].tolist()
        signature, name_length, extra_length = _HEADER.unpack(self.files.read(file, offset, _HEADER.size))
        if signature != b"PK\3\4":
            raise BadImage("the archive is damaged: no member begins where it should")
        data = self.files.read(file, offset + _HEADER.size + name_length + extra_length, size)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if self._deflated[index] else data
        except zlib.error as error:
            raise BadImage(f"the archive is damaged: {error}") from error
        if zlib.crc32(data) != self._checksums[index]:
            raise BadImage("the archive is damaged: the checksum does not fit")
        return RawImage(self.name(index), data)
