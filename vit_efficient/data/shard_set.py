"""Shards that belong together, wherever they lie, and how one of them is opened."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.files import read_span
from vit_efficient.data.manifest import Manifest, ShardEntry
from vit_efficient.data.remote.folder import RemoteFolder
from vit_efficient.data.remote.indices import remote_index
from vit_efficient.data.remote.shard_cache import ShardCache
from vit_efficient.data.shards import read_index
from vit_efficient.errors import DataError

log = logging.getLogger(__name__)


class OpenShard(Protocol):
    """One shard's bytes, by position."""

    name: str  # for messages
    distant: bool  # whether it pays to read several parts at a time

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes; fewer only where the shard ends.

        Raises:
            DataError: they are not to be had.
        """

    def close(self) -> None:
        """Let go of it."""


class LocalShard:
    """An open file."""

    distant = False

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self.name = descriptor, name

    def read(self, offset: int, length: int) -> bytes:
        try:
            return read_span(self._descriptor, offset, length)
        except OSError as error:
            raise DataError(f"{self.name} cannot be read: {error.strerror}.") from error

    def close(self) -> None:
        os.close(self._descriptor)


class RemoteShard:
    """A file at a URL, read in parts."""

    distant = True

    def __init__(self, folder: RemoteFolder, file: str) -> None:
        self._folder, self._file, self.name = folder, file, folder.shown(file)
        folder.connect()  # here, and not in each of the threads that read

    def read(self, offset: int, length: int) -> bytes:
        return self._folder.read_part(self._file, offset, length)

    def close(self) -> None:
        """There is nothing to close: connections belong to the folder."""


@dataclass(frozen=True)
class ShardSet:
    """Shards that belong together.

    Args:
        folder: where they lie.
        manifest: what they are.
    """

    folder: Path | RemoteFolder
    manifest: Manifest

    @property
    def place(self) -> str:
        """The folder as `data.shards` has it, credentials and all."""
        return self.folder.url if isinstance(self.folder, RemoteFolder) else str(self.folder)

    def name(self, number: int) -> str:
        """Path or URL of shard `number`, as the manifest counts, for people to read."""
        file = self.manifest.shards[number].file
        return self.folder.shown(file) if isinstance(self.folder, RemoteFolder) else str(self.folder / file)

    def path(self, number: int) -> Path:
        """File of a local shard."""
        assert isinstance(self.folder, Path), "a remote shard has no path"
        return self.folder / self.manifest.shards[number].file

    def index(self, number: int) -> NDArray[np.void]:
        """The offset index of a shard, an array of `INDEX_DTYPE`; the shard itself is not needed.

        Raises:
            DataError: it is absent or damaged.
        """
        entry = self.manifest.shards[number]
        if isinstance(self.folder, RemoteFolder):
            return remote_index(self.folder, entry)
        return read_index(self.folder / entry.file, entry.samples, entry.bytes)

    def open(self, number: int) -> tuple[OpenShard, NDArray[np.void]]:
        """A shard and its offset index.

        Raises:
            DataError: one of them is absent, or the index is damaged.
        """
        offsets, entry = self.index(number), self.manifest.shards[number]
        if isinstance(self.folder, RemoteFolder):
            return _open_remote(self.folder, entry), offsets
        path = self.folder / entry.file
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"The shard {path} cannot be opened: {error.strerror}.") from error
        return LocalShard(descriptor, str(path)), offsets

    def check(self, *, tolerant: bool = False) -> None:
        """See at the start what can be seen without reading: sizes of local shards, room in the cache of others.

        Args:
            tolerant: of shards of a wrong size, only warn: samples of them will be left out.

        Raises:
            DataError: shards that are absent or truncated, the first five by name; a cache that is too small.
        """
        if isinstance(self.folder, RemoteFolder):
            if self.folder.config.cache is not None:
                ShardCache(self.folder.config.cache, self.folder.config.cache_bytes).check(self.manifest.shards)
            return
        wrong = []
        for fault, absent in _wrong_sizes(self.folder, self.manifest):
            if tolerant and not absent:
                log.warning("%s: %s", self.folder, fault)
            else:
                wrong.append(fault)
        if wrong:
            more = f"\n    and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            listed = "\n    ".join(wrong[:5])
            raise DataError(f"Damaged shards in {self.folder}:\n    {listed}{more}\nCopy or prepare them again.")


def _wrong_sizes(folder: Path, manifest: Manifest) -> Iterator[tuple[str, bool]]:
    """What is wrong with a shard, and whether that is that it is not there."""
    for entry in manifest.shards:
        try:
            size = (folder / entry.file).stat().st_size
        except FileNotFoundError:
            yield f"{entry.file} is not there", True
            continue
        if size != entry.bytes:
            kind = "truncated" if size < entry.bytes else "not the one prepared"
            yield f"{entry.file} is {kind}: {size:,} bytes, {entry.bytes:,} in the manifest", False


def _open_remote(folder: RemoteFolder, entry: ShardEntry) -> OpenShard:
    """From the cache, if there is one and it has room."""
    shown, config = folder.shown(entry.file), folder.config
    kept = ShardCache(config.cache, config.cache_bytes).open(folder, entry) if config.cache is not None else None
    if kept is None:
        return RemoteShard(folder, entry.file)
    return LocalShard(kept.descriptor, f"{shown} (kept as {kept.path})" if kept.whole else shown)
