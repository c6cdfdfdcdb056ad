"""Offset indices of shards at a URL: fetched once, kept on a local disk, mapped into memory by every process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vit_efficient.data.files import make_folder
from vit_efficient.data.manifest import ShardEntry
from vit_efficient.data.remote.folder import RemoteFolder
from vit_efficient.data.shards import index_path, parse_index, read_index
from vit_efficient.errors import DataError
from vit_efficient.machine import cache_dir


def remote_index(folder: RemoteFolder, entry: ShardEntry) -> NDArray[np.void]:
    """The index of one shard, an array of `INDEX_DTYPE`.

    It is kept under the shard's sha256, in `indices` of the cache folder (`data.remote.cache`, or that of this user).

    Raises:
        DataError: it is not to be had, or belongs to another shard.
    """
    places = (folder.config.cache or cache_dir()).expanduser() / "indices"
    kept = places / f"{entry.sha256}.tar"
    with contextlib.suppress(DataError):  # not there yet, or damaged
        return read_index(kept, entry.samples, entry.bytes)
    name = index_path(Path(entry.file)).name
    data, shown = folder.read(name), folder.shown(name)
    parse_index(data, entry.samples, entry.bytes, shown, folder.shown(entry.file))
    make_folder(places)
    _place(data, index_path(kept))
    return read_index(kept, entry.samples, entry.bytes)


def _place(data: bytes, path: Path) -> None:
    """Write a file that many processes may write at once: the last of them wins, and all wrote the same."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)
            file.write(data)
        os.replace(name, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from error
