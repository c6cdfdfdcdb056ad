"""Files: written so that a reader sees all of one or nothing, read by position."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vit_efficient.errors import DataError


def partial_path(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` when the block ends well, already on the disk; never a half of it."""
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file through `atomic_writer`."""
    with atomic_writer(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, or say why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}. Choose another folder.") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns the trouble of writing to a folder into words.

    Raises:
        DataError: no right to write, no room, ...
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}. Mend that, and start this again.") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another process is writing to {folder}; wait for it, or choose another folder.") from None
        yield
    finally:
        os.close(descriptor)


def read_span(descriptor: int, offset: int, length: int) -> bytes:
    """Read exactly so many bytes; fewer only at the end of the file."""
    span = os.pread(descriptor, length, offset)
    while len(span) < length and (more := os.pread(descriptor, length - len(span), offset + len(span))):
        span += more
    return span


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_span(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of it at one place."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
