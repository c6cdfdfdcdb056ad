"""Whole shards on a local disk: downloaded once for all processes, checked, and thrown out by age."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vit_efficient.data.files import make_folder, sha256_of
from vit_efficient.data.manifest import ShardEntry
from vit_efficient.data.remote.folder import RemoteFolder
from vit_efficient.errors import DataError

log = logging.getLogger(__name__)

_SHARDS = (".tar", ".damaged")
_full: set[Path] = set()  # caches of which this process has said so


@dataclass(frozen=True)
class Kept:
    """A shard that is open: while its descriptor is, nobody throws it out.

    Args:
        descriptor: for reading; the caller closes it.
        path: of the file.
        whole: it was what the manifest says; False: its samples must be looked at one by one.
    """

    descriptor: int
    path: Path
    whole: bool


class ShardCache:
    """A folder that holds shards under their sha256, so that it does not matter where they came from.

    Any number of processes may use it at once. One downloads a shard while those who want it too wait. Every lock is
    one of the kernel's on an open file, so it goes with its process, and nobody waits for a dead one.

    A shard that is not what its manifest says is kept too, as `.damaged`, so that every process does not download it
    again to see the same; the next run does.

    Args:
        folder: of the cache.
        limit: bytes that it may hold.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder.expanduser(), limit

    def check(self, entries: tuple[ShardEntry, ...]) -> None:
        """Make sure at the start that it can work.

        Raises:
            DataError: the folder cannot be used, or one shard alone is larger than the limit.
        """
        largest = max(entry.bytes for entry in entries)
        if largest > self.limit:
            raise DataError(
                f"data.remote.cache_size of {self.limit / 1e9:g} GB is less than one shard ({largest / 1e9:g} GB). "
                "Raise it, or unset data.remote.cache."
            )
        with self._errors(), _locked(self.folder / ".lock"):
            for entry in entries:
                (self.folder / f"{entry.sha256}.damaged").unlink(missing_ok=True)

    def open(self, source: RemoteFolder, entry: ShardEntry) -> Kept | None:
        """Open a shard, which is downloaded if need be.

        Returns:
            None where there is no room for it: others that are open, or on their way, take it all.

        Raises:
            DataError: it is not to be had, or the folder cannot be used.
        """
        with self._errors():
            if (kept := self._find(entry)) is not None:
                return kept
            with _locked(self.folder / f"{entry.sha256}.lock"):
                if (kept := self._find(entry)) is not None:  # somebody else was faster
                    return kept
                partial = self.folder / f"{entry.sha256}.partial"
                if not self._reserve(partial, entry.bytes):
                    return None
                try:
                    return self._download(source, entry, partial)
                finally:
                    partial.unlink(missing_ok=True)

    def _download(self, source: RemoteFolder, entry: ShardEntry, partial: Path) -> Kept:
        with open(partial, "r+b") as file:
            size = source.download(entry.file, file, entry.bytes)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        whole = sha256_of(partial) == entry.sha256
        if not whole:
            log.warning(
                "%s is not the shard of the manifest (its sha256 differs, of %s bytes): its samples are checked one "
                "by one",
                source.shown(entry.file),
                f"{size:,}",
            )
        descriptor = _open(partial)  # before others can see it, and throw it out
        assert descriptor is not None, "its lock keeps everybody else away"
        path = partial.with_suffix(".tar" if whole else ".damaged")
        os.replace(partial, path)
        return Kept(descriptor, path, whole)

    def _find(self, entry: ShardEntry) -> Kept | None:
        for suffix in _SHARDS:
            path = self.folder / f"{entry.sha256}{suffix}"
            descriptor = _open(path)
            if descriptor is None:
                continue
            whole = suffix == ".tar"
            if whole and os.fstat(descriptor).st_size != entry.bytes:  # a disk that lost power, or somebody's hand
                os.close(descriptor)
                path.unlink(missing_ok=True)
                continue
            return Kept(descriptor, path, whole)
        return None

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make room, and take it at once, so that two who download at a time do not count on the same."""
        with _locked(self.folder / ".lock"):
            self._sweep()
            used, shards = 0, []
            for item in os.scandir(self.folder):
                if item.name.endswith((*_SHARDS, ".partial")):
                    status = item.stat()
                    used += status.st_size
                    if item.name.endswith(_SHARDS):
                        shards.append((status.st_mtime, status.st_size, item.path))
            for _, freed, name in sorted(shards):
                if used + size <= self.limit:
                    break
                if _throw_out(name):
                    used -= freed
            if used + size > self.limit:
                if self.folder not in _full:
                    _full.add(self.folder)
                    log.warning(
                        "%s has no room beside the shards that are open or being downloaded: some are read without it",
                        self.folder,
                    )
                return False
            with open(partial, "wb") as file:
                file.truncate(size)  # a hole: it counts, and costs nothing yet
            return True

    def _sweep(self) -> None:
        """Remove what killed processes left: partial files whose lock nobody holds."""
        for partial in self.folder.glob("*.partial"):
            with contextlib.suppress(BlockingIOError), _locked(partial.with_suffix(".lock"), wait=False):
                partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        make_folder(self.folder)
        try:
            yield
        except OSError as error:
            raise DataError(
                f"data.remote.cache={self.folder} cannot be used: {error.strerror or error}. It needs room, and a file "
                "system with locks: choose a folder on a local disk."
            ) from error


def _open(path: Path) -> int | None:
    """Open a shard, hold it, and note that it is in use."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # thrown out just now
        os.close(descriptor)
        return None
    with contextlib.suppress(OSError):  # another user's
        os.utime(path)
    return descriptor


def _throw_out(name: str) -> bool:
    """Remove a shard, unless somebody has it open."""
    descriptor = os.open(name, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name)
    except (BlockingIOError, PermissionError):  # in use; another user's
        return False
    finally:
        os.close(descriptor)
    return True


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
