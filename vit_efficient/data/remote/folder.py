"""A folder of files at a URL, read through fsspec: whole files and parts of files, with retries."""

from __future__ import annotations

import importlib
import os
import re
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.remote.retry import Shorter, with_retries
from vit_efficient.errors import DataError

_PART = 16 << 20  # bytes fetched at once of a whole file
_RANGE_BEYOND_END = 416
# In a forked process, the parent's file system would close its connections through a thread that is not there, and
# wait for it. A file system is small, and there is one a folder and process.
_never_collected: list[Any] = []


def is_url(text: str) -> bool:
    """Whether this names something that is not a local path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def without_credentials(url: str) -> str:
    """The URL as it may be shown."""
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
    _opened: tuple[int, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if urlsplit(self.url).query:
            raise DataError(
                f"{without_credentials(self.url)}: the files of a folder are found by their names below it, and a URL "
                "with ?... has no below. Give one without."
            )

    def __str__(self) -> str:
        return without_credentials(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def child(self, name: str) -> RemoteFolder:
        """A folder below this one."""
        return RemoteFolder(f"{self.url}/{name}", self.config)

    def parent(self) -> RemoteFolder:
        """The folder above."""
        return RemoteFolder(self.url.rpartition("/")[0], self.config)

    def shown(self, file: str) -> str:
        """A file's URL, for messages."""
        return f"{self}/{file}"

    def read(self, file: str) -> bytes:
        """A whole file, for small ones.

        Raises:
            Absent: not there.
            DataError: not to be had.
        """
        path = f"{self.url}/{file}"
        return with_retries(lambda: self._filesystem().cat_file(path), self.shown(file), self.config.attempts)

    def read_range(self, file: str, offset: int, length: int) -> bytes:
        """A part of a file; shorter only where the file ends.

        Raises:
            Absent: not there.
            DataError: not to be had, or the server sends whole files only.
        """
        data = b""

        def fetch() -> bytes:
            nonlocal data
            data = self._range(file, offset, length)
            if len(data) < length:
                raise Shorter(f"{len(data):,} bytes of {length:,}")
            return data

        try:
            return with_retries(fetch, self.shown(file), self.config.attempts)
        except Shorter:
            return data

    def download(self, file: str, target: BinaryIO, size: int) -> None:
        """Copy a file, part by part, each with its own retries; what does not arrive is missing at the end.

        Args:
            file: its name.
            target: open for writing.
            size: bytes that it should have.
        """
        for offset in range(0, size, _PART):
            target.write(self.read_range(file, offset, min(_PART, size - offset)))

    def _range(self, file: str, offset: int, length: int) -> bytes:
        try:
            data: bytes = self._filesystem().cat_file(f"{self.url}/{file}", start=offset, end=offset + length)
        except Exception as error:  # each file system has its own; this one is told by its status
            if getattr(error, "status", None) == _RANGE_BEYOND_END:
                return b""
            raise
        if len(data) > length:
            raise DataError(
                f"{self.shown(file)}: the server sends the whole file where a part was asked for. Shards must come "
                "from one that knows byte ranges; copy them to a local folder otherwise."
            )
        return data

    def _filesystem(self) -> Any:
        """This process's own: neither its sockets nor its thread survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), _open(self.url, self.config))
            _never_collected.append(self._opened[1])
        return self._opened[1]


def _open(url: str, config: RemoteConfig) -> Any:
    from fsspec.core import url_to_fs

    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme in ("http", "https"):
        aiohttp = importlib.import_module("aiohttp")
        limits = aiohttp.ClientTimeout(
            total=None, connect=config.timeout, sock_connect=config.timeout, sock_read=config.timeout
        )
        options["client_kwargs"] = {"timeout": limits}
    elif scheme == "s3":
        options["config_kwargs"] = {"connect_timeout": config.timeout, "read_timeout": config.timeout}
    try:
        return url_to_fs(url, **options)[0]
    except ImportError as error:
        extra = "; it comes with `pip install 'vit_efficient[s3]'`" if scheme == "s3" else ""
        raise DataError(
            f"{without_credentials(url)}: {scheme}:// needs a package that is not installed: {error}{extra}."
        ) from error
    except ValueError as error:
        raise DataError(f"{without_credentials(url)}: fsspec knows no {scheme}://: {error}.") from error
