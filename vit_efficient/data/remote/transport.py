"""How files at a URL are asked for: what a folder needs of HTTP, of S3, and of all else that fsspec opens."""

from __future__ import annotations

import shutil
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.data.remote.retry import Busy
from vit_efficient.errors import DataError

_BLOCK = 1 << 20


class Shorter(OSError):  # noqa: N818 - named for the thing
    """Fewer bytes came than the file has there."""


class PartsRefused(Exception):  # noqa: N818 - likewise
    """The server sends whole files only."""


class Transport(Protocol):
    """Paths are whole URLs, times are in seconds; what a network may do raises an `OSError`."""

    def read(self, path: str, seconds: float) -> bytes:
        """A whole file."""

    def read_part(self, path: str, offset: int, length: int, seconds: float) -> bytes:
        """A part of a file; shorter only where the file ends.

        Raises:
            PartsRefused: there is no way to have a part.
        """

    def copy(self, path: str, target: BinaryIO, seconds: float) -> int:
        """Write a whole file to another one; how many bytes it had."""


class FsspecTransport:
    """Any of fsspec's file systems."""

    def __init__(self, files: Any) -> None:
        self._files = files

    def read(self, path: str, seconds: float) -> bytes:
        data: bytes = self._call("cat_file", seconds, path)
        return data

    def read_part(self, path: str, offset: int, length: int, seconds: float) -> bytes:
        try:
            data: bytes = self._call("cat_file", seconds, path, start=offset, end=offset + length)
        except (TimeoutError, FileNotFoundError, PermissionError, Busy):
            raise
        except OSError:  # some read nothing past the end, others refuse to
            if self._size(path, seconds) > offset:
                raise
            return b""
        if len(data) < length and self._size(path, seconds) > offset + len(data):
            raise Shorter(f"{len(data):,} bytes came of {length:,}")
        return data

    def copy(self, path: str, target: BinaryIO, seconds: float) -> int:
        with self._files.open(path, "rb") as source:
            shutil.copyfileobj(source, target, _BLOCK)
        return target.tell()

    def _size(self, path: str, seconds: float) -> int:
        return int(self._call("info", seconds, path)["size"])

    def _call(self, name: str, seconds: float, *args: Any, **options: Any) -> Any:
        """Asynchronous file systems stop after so many seconds; the others have time-outs of their own, if any."""
        from fsspec.asyn import AsyncFileSystem, sync

        try:
            if isinstance(self._files, AsyncFileSystem):
                return sync(self._files.loop, getattr(self._files, f"_{name}"), *args, timeout=seconds, **options)
            return getattr(self._files, name)(*args, **options)
        except OSError:
            raise
        except Exception as error:  # every file system has errors of its own, or of its client library
            kind = type(error).__name__
            if "Credentials" in kind:  # botocore's, google.auth's: no trying mends them
                raise PermissionError(str(error)) from error
            raise Busy(f"{kind}: {error}") from error


def open_transport(url: str, shown: str, config: RemoteConfig) -> Transport:
    """What reads files below a URL.

    Args:
        url: of a folder.
        shown: the same without credentials, for messages.
        config: time-outs.

    Raises:
        DataError: fsspec knows no such scheme, or lacks the package for it.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        from vit_efficient.data.remote.http import HttpTransport

        return HttpTransport(config.timeout)
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"skip_instance_cache": True}
    if scheme == "s3":
        options["config_kwargs"] = {"connect_timeout": config.timeout, "read_timeout": config.timeout}
    try:
        return FsspecTransport(url_to_fs(url, **options)[0])
    except ImportError as error:
        extra = "; in the checkout `pip install -e '.[s3]'` brings it" if scheme == "s3" else ""
        raise DataError(f"{shown}: {scheme}:// needs a package that is not installed: {error}{extra}.") from error
    except ValueError as error:
        raise DataError(f"{shown}: fsspec knows no {scheme}://: {error}.") from error
