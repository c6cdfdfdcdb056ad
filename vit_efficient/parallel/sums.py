"""Whether the bytes of a checkpoint are those that were written.

Neither `torch.load` nor PyTorch's distributed checkpoint looks at checksums: both load a weight with a flipped bit
(tried, torch 2.15). A single file is a zip archive, which carries them. Of a folder, ``rest.pt`` is one as well, and it
lists the size and the CRC-32 of every other file there.
"""

from __future__ import annotations

import logging
import pickle
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vit_efficient.machine import rank
from vit_efficient.parallel.index import INDEX, part_sizes

REST = "rest.pt"  # what is not a tensor, and the sums; readable with `weights_only`
THREADS = 8  # zlib gives the interpreter's lock away while it counts
CHUNK = 1 << 20
log = logging.getLogger(__name__)
Sums = dict[str, dict[str, int]]


def sums_of(files: Iterable[Path]) -> Sums:
    """``{name: {"bytes": size, "crc32": checksum}}`` of files, as they are read back."""
    listed = list(files)
    with ThreadPoolExecutor(THREADS) as pool:
        return {file.name: found for file, found in zip(listed, pool.map(_sum, listed), strict=True)}


def _sum(file: Path) -> dict[str, int]:
    size = checksum = 0
    with open(file, "rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return {"bytes": size, "crc32": checksum}


def file_damage(path: Path) -> str | None:
    """What is wrong with the bytes of a file of `torch.save`, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    # NotImplementedError: a damaged header may ask for a compression that does not exist.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        return f"{error} ({path.stat().st_size:,} bytes)"
    except OSError as error:  # the disk itself
        return f"it cannot be read: {error}"
    return f"the bytes of {broken} do not have the checksum that they were written with" if broken else None


def folder_damage(path: Path) -> str | None:
    """What is wrong with the bytes of a checkpoint folder, or None.

    Folders of earlier versions list no checksums. Of them only the sizes can be checked, and the log says so. A folder
    is read once only by a process, by several threads; the files are in the system's cache when they are read again.
    """
    for name in (REST, INDEX):
        if not (path / name).is_file():
            return f"{name} is missing"
    files = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    return _damage(path, tuple((name, now.st_ino, now.st_size, now.st_mtime_ns) for name, now in files))


@lru_cache(maxsize=64)
def _damage(path: Path, _state: tuple[tuple[str, int, int, int], ...]) -> str | None:
    if (reason := file_damage(path / REST)) is not None:
        return f"{REST}: {reason}"
    try:
        rest: Any = torch.load(path / REST, map_location="cpu", weights_only=True)
        expected: Sums | None = rest.get("files")
        sizes = {name: each["bytes"] for name, each in expected.items()} if expected else part_sizes(path)
        for name, size in sizes.items():
            if not (path / name).is_file():
                return f"the part {name} is missing"
            found = (path / name).stat().st_size
            if found < size or (expected and found != size):
                return f"the part {name} has {found:,} bytes of {size:,}"
        if expected is None:
            if rank() == 0:
                log.warning("%s was written without checksums, by an earlier version: only sizes are checked", path)
            return None
        actual = sums_of(path / name for name in expected)
    # What is in a foreign file may have any form.
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    wrong = [name for name in expected if actual[name] != expected[name]]
    return f"the bytes of {wrong[0]} do not have the checksum that they were written with" if wrong else None
