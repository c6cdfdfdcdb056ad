"""A folder of files at a URL: whole files, parts of files and copies of files, with retries."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from vit_efficient.data.files import write_span
from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.remote.retry import with_retries
from vit_efficient.data.remote.transport import PartsRefused, Transport, open_transport
from vit_efficient.errors import DataError

_PART = 8 << 20  # bytes fetched at once of a whole shard
# In a forked process, the parent's file system would close its connections through a thread that is not there, and
# wait for it. A file system is small, and there is one a folder and process.
_never_collected: list[Transport] = []


class WholeFilesOnly(DataError):  # noqa: N818 - named for the thing
    """A part of a file was asked for, and the server has no way to send one."""


def is_url(text: str) -> bool:
    """Whether this names something that is not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def without_credentials(url: str) -> str:
    """The URL as it may be shown; a local path as it is."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    netloc = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, netloc, parts.path, "", ""))


@dataclass
class RemoteFolder:
    """Files below a URL. Every process opens connections of its own; a copy that is pickled has none.

    Args:
        url: without a slash at its end.
        config: time-outs and retries.
    """

    url: str
    config: RemoteConfig = field(default_factory=RemoteConfig)
    _opened: tuple[int, Transport] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if urlsplit(self.url).query:
            raise DataError(
                f"{without_credentials(self.url)}: the files of a folder are found by their names below it, and a URL "
                "with ?... has no below. Give one without."
            )

    def __str__(self) -> str:
        return without_credentials(self.url)

    def __repr__(self) -> str:
        return f"RemoteFolder({str(self)!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def child(self, name: str) -> RemoteFolder:
        """A folder below this one."""
        return RemoteFolder(f"{self.url}/{name}", self.config)

    def sibling(self, name: str) -> RemoteFolder | None:
        """A folder beside this one; None where this one is all of a server, or of a bucket."""
        parent, _, own = self.url.rpartition("/")
        return RemoteFolder(f"{parent}/{name}", self.config) if own and not parent.endswith("/") else None

    def shown(self, file: str) -> str:
        """A file's URL, for messages."""
        return f"{self}/{file}"

    def connect(self) -> Transport:
        """What this process asks for files with; neither sockets nor threads survive a fork.

        Raises:
            DataError: nothing here can read such a URL.
        """
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), open_transport(self.url, str(self), self.config))
            _never_collected.append(self._opened[1])
        return self._opened[1]

    def read(self, file: str) -> bytes:
        """A whole file, for small ones.

        Raises:
            Absent: not there.
            DataError: not to be had.
        """
        transport, path = self.connect(), f"{self.url}/{file}"
        return with_retries(lambda seconds: transport.read(path, seconds), self.shown(file), self.config)

    def read_part(self, file: str, offset: int, length: int) -> bytes:
        """A part of a file; shorter only where the file ends.

        Raises:
            Absent: not there.
            WholeFilesOnly: the server knows no parts.
            DataError: not to be had.
        """
        transport, path = self.connect(), f"{self.url}/{file}"
        try:
            return with_retries(
                lambda seconds: transport.read_part(path, offset, length, seconds), self.shown(file), self.config
            )
        except PartsRefused as error:
            raise WholeFilesOnly(
                f"{self.shown(file)}: the server sends whole files only, where a part was asked for. Set "
                "data.remote.cache, with a data.remote.cache_size that has room for the shards that are read at the "
                "same time (data.streams)."
            ) from error

    def download(self, file: str, target: BinaryIO, size: int) -> int:
        """Copy a file, several parts at a time, each with its own retries.

        Args:
            file: its name.
            target: a file that is open for writing.
            size: bytes that it should have, and that are fetched at most.

        Returns:
            bytes that it has; what is missing is missing at the end.

        Raises:
            Absent: not there.
            DataError: not to be had.
        """

        def fetch(offset: int) -> int:
            data = self.read_part(file, offset, min(_PART, size - offset))
            write_span(target.fileno(), data, offset)
            return len(data)

        try:
            done = fetch(0)
        except WholeFilesOnly:
            return self._copy(file, target, size)
        with ThreadPoolExecutor(self.config.connections) as pool:
            return done + sum(pool.map(fetch, range(_PART, size, _PART)))

    def _copy(self, file: str, target: BinaryIO, size: int) -> int:
        """From a server that knows no parts; every attempt begins again."""
        transport, path = self.connect(), f"{self.url}/{file}"

        def copy(seconds: float) -> int:
            target.seek(0)
            return transport.copy(path, target, seconds)

        patience = self.config.patience * -(-size // _PART)
        whole = self.config.model_copy(update={"patience": patience})
        return with_retries(copy, self.shown(file), whole)
