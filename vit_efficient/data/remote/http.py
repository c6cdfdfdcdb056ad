"""Files from an HTTP server: whole ones, parts of them, and what its answers mean."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, BinaryIO, TypeVar

from aiohttp import (
    ClientConnectorCertificateError,
    ClientError,
    ClientResponse,
    ClientResponseError,
    ClientTimeout,
    InvalidURL,
)
from fsspec import filesystem
from fsspec.asyn import sync

from vit_efficient.data.remote.retry import Busy, Refused
from vit_efficient.data.remote.transport import PartsRefused, Shorter

_T = TypeVar("_T")

_BLOCK = 1 << 20
_OK, _PART, _BEYOND_THE_END = 200, 206, 416
_ABSENT = (404, 410)
_REFUSED = {401: "asks for credentials", 403: "refuses access"}
_PASSES = (408, 425, 429)  # of the 4xx; all 5xx do
_AS_IT_IS = {"Accept-Encoding": "identity"}  # byte positions are those of the file, not of a compressed answer


class HttpTransport:
    """Asks an HTTP server, by fsspec's session and thread.

    fsspec's own `cat_file` would read a whole shard before it sees that the server ignored the range.

    Args:
        timeout: seconds to wait for a connection, and for the next bytes of one.
    """

    def __init__(self, timeout: float) -> None:
        limits = ClientTimeout(total=None, connect=timeout, sock_connect=timeout, sock_read=timeout)
        # trust_env: proxies from the environment, credentials from ~/.netrc
        self._files = filesystem("http", skip_instance_cache=True, client_kwargs={"timeout": limits, "trust_env": True})

    def read(self, path: str, seconds: float) -> bytes:
        async def work(answer: ClientResponse) -> bytes:
            _expect(answer, _OK)
            return await answer.read()

        return self._ask(path, {}, work, seconds)

    def read_part(self, path: str, offset: int, length: int, seconds: float) -> bytes:
        async def work(answer: ClientResponse) -> bytes:
            if answer.status == _BEYOND_THE_END:
                return b""
            if answer.status == _OK:
                raise PartsRefused
            _expect(answer, _PART)
            stop, total = _range_of(answer, offset, length)
            data = await answer.read()
            if len(data) != stop - offset or (stop < offset + length and stop < total):
                raise Shorter(f"{len(data):,} bytes came of {length:,}")
            return data

        return self._ask(path, {"Range": f"bytes={offset}-{offset + length - 1}"}, work, seconds)

    def copy(self, path: str, target: BinaryIO, seconds: float) -> int:
        async def work(answer: ClientResponse) -> int:
            _expect(answer, _OK)
            size = 0
            async for block in answer.content.iter_chunked(_BLOCK):
                size += target.write(block)
            return size

        return self._ask(path, {}, work, seconds)

    def _ask(
        self, url: str, headers: dict[str, str], work: Callable[[ClientResponse], Awaitable[_T]], seconds: float
    ) -> _T:
        async def ask() -> _T:
            session = await self._files.set_session()
            async with session.get(self._files.encode_url(url), headers=_AS_IT_IS | headers) as answer:
                return await work(answer)

        try:
            done: _T = sync(self._files.loop, ask, timeout=seconds)
        except ClientConnectorCertificateError as error:
            raise Refused(f"cannot prove who it is: {error.certificate_error}") from error
        except InvalidURL as error:
            raise Refused("cannot be found by this URL") from error
        except TimeoutError:
            raise
        except ClientError as error:
            kind = type(error).__name__
            secret = isinstance(error, ClientResponseError)  # its text has the whole URL
            raise OSError(kind if secret or not str(error) else f"{kind}: {error}") from error
        return done


def _expect(answer: ClientResponse, status: int) -> None:
    """Raise what any other status means."""
    found = answer.status
    if found == status:
        return
    if found in _ABSENT:
        raise FileNotFoundError
    if found in _REFUSED:
        raise Refused(_REFUSED[found])
    if found >= 500 or found in _PASSES:
        asked = answer.headers.get("Retry-After", "")
        raise Busy(f"the server answered with status {found}", float(asked) if asked.isdecimal() else 0.0)
    raise Refused(f"answers with status {found}")


def _range_of(answer: ClientResponse, offset: int, length: int) -> tuple[int, float]:
    """Where the part that comes ends, and where the file does."""
    text = answer.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text.strip())
    if match is None or int(match[1]) != offset or not offset <= int(match[2]) < offset + length:
        raise Refused(f"answers with another part than it was asked for ({text or 'it does not say which'})")
    total: Any = match[3]
    return int(match[2]) + 1, float("inf") if total == "*" else int(total)
