from __future__ import annotations

import errno
from pathlib import Path

import pytest

from vit_efficient.data.files import read_span, writing
from vit_efficient.errors import DataError


def test_trouble_with_a_folder_is_put_into_words() -> None:
    with pytest.raises(DataError, match="out cannot be written: Permission denied"), writing(Path("out")):
        raise PermissionError(errno.EACCES, "Permission denied", "out/x")


def test_a_span_is_whole_or_ends_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as file:
        assert read_span(file.fileno(), 10, 5) == bytes(range(10, 15))
        assert read_span(file.fileno(), 95, 10) == bytes(range(95, 100))
        assert read_span(file.fileno(), 200, 10) == b""
