"""Putting a folder in the place of another, which no single call of the system does everywhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

END = ".old.tmp"


@contextmanager
def set_aside(path: Path) -> Iterator[None]:
    """Within, ``path`` is free for what replaces it. What was there is removed afterwards, or put back after an error.

    A process that is killed within leaves it under another name, which `aside` knows.
    """
    old = path.with_name(f".{path.name}{END}")
    remove(old)
    if path.exists():
        os.rename(path, old)
    try:
        yield
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    remove(old)


def aside(folder: Path) -> Iterator[tuple[Path, Path]]:
    """What `set_aside` left in a folder: where it is, and where it was if nothing has replaced it."""
    for old in folder.glob(f".*{END}"):
        path = old.with_name(old.name[1 : -len(END)])
        if not path.exists():
            yield old, path


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
