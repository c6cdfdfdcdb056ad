"""Whole shards on a local disk: downloaded once for all processes, checked, and thrown out by age."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from vit_efficient.data.files import make_folder
from vit_efficient.data.manifest import ShardEntry
from vit_efficient.data.remote.folder import RemoteFolder
from vit_efficient.errors import DataError

log = logging.getLogger(__name__)

_BLOCK = 1 << 20


class ShardCache:
    """A folder that holds shards under their sha256, so that it does not matter where they came from.

    Any number of processes may use it at once. One downloads a shard while those who want it too wait; a lock goes with
    its process, so that nobody waits for a dead one. A shard that is thrown out stays readable to whoever has it open.

    Args:
        folder: of the cache.
        limit: bytes that it may hold.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder.expanduser(), limit

    def check(self, entries: tuple[ShardEntry, ...]) -> None:
        """Make sure at the start that it can work.

        Raises:
            DataError: the folder cannot be made, or one shard alone is larger than the limit.
        """
        make_folder(self.folder)
        largest = max(entry.bytes for entry in entries)
        if largest > self.limit:
            raise DataError(
                f"data.remote.cache_size of {self.limit / 1e9:g} GB is less than one shard ({largest / 1e9:g} GB). "
                "Raise it, or unset data.remote.cache."
            )

    def open(self, source: RemoteFolder, entry: ShardEntry) -> int | None:
        """A descriptor of the shard's file, which is downloaded if need be.

        Returns:
            None where it cannot be kept: other shards that are being downloaded take all the room, or what arrives is
            not what the manifest says (a warning tells).

        Raises:
            DataError: it is not to be had.
        """
        make_folder(self.folder)
        path = self.folder / f"{entry.sha256}.tar"
        if (descriptor := _open(path)) is not None:
            return descriptor
        with _locked(self.folder / f"{entry.sha256}.lock"):
            if (descriptor := _open(path)) is not None:  # somebody else was faster
                return descriptor
            partial = self.folder / f"{entry.sha256}.partial"
            if not self._reserve(partial, entry.bytes):
                return None
            try:
                return self._download(source, entry, partial, path)
            finally:
                partial.unlink(missing_ok=True)

    def _download(self, source: RemoteFolder, entry: ShardEntry, partial: Path, path: Path) -> int | None:
        try:
            with open(partial, "r+b") as file:
                source.download(entry.file, file, entry.bytes)
                file.flush()
                os.fsync(file.fileno())
            if _sha256(partial) != entry.sha256:
                log.warning(
                    "%s is not the shard of the manifest: its sha256 differs. It is read in parts, and not kept",
                    source.shown(entry.file),
                )
                return None
            os.replace(partial, path)
        except OSError as error:
            raise DataError(f"data.remote.cache={self.folder} cannot be written: {error.strerror}.") from error
        return _open(path)

    def _reserve(self, partial: Path, size: int) -> bool:
        """Make room, and take it at once, so that two who download at a time do not count on the same."""
        with _locked(self.folder / ".lock"):
            self._sweep()
            used, shards = 0, []
            for item in os.scandir(self.folder):
                if item.name.endswith((".tar", ".partial")):
                    status = item.stat()
                    used += status.st_size
                    if item.name.endswith(".tar"):
                        shards.append((status.st_mtime, status.st_size, item.path))
            for _, freed, name in sorted(shards):
                if used + size <= self.limit:
                    break
                Path(name).unlink(missing_ok=True)
                used -= freed
            if used + size > self.limit:
                log.warning("%s has no room beside the shards that are being downloaded; one is not kept", self.folder)
                return False
            with open(partial, "wb") as file:
                file.truncate(size)  # a hole: it counts, and costs nothing yet
            return True

    def _sweep(self) -> None:
        """Remove what killed processes left: partial files whose lock nobody holds."""
        for partial in self.folder.glob("*.partial"):
            with contextlib.suppress(BlockingIOError), _locked(partial.with_suffix(".lock"), wait=False):
                partial.unlink(missing_ok=True)


def _open(path: Path) -> int | None:
    """Open a shard, and note that it is in use."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return descriptor


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
