"""Tries again what a network may have spoilt, and says at once what no trying mends."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vit_efficient.errors import DataError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_FIRST, _LONGEST = 0.5, 30.0  # seconds
_SHORT = 3  # attempts: what stays short is the file's fault, not the network's
_DENIED = {401: "asks for credentials", 403: "refuses access"}
_ABSENT = (404, 410)
_AGAIN = {408, 425, 429}  # of the 4xx, those that pass


class Shorter(OSError):  # noqa: N818 - named for the thing
    """Fewer bytes came than were asked for."""


class Absent(DataError):  # noqa: N818 - named for the thing
    """There is no such file."""


def with_retries(work: Callable[[], _T], what: str, attempts: int) -> _T:
    """Do something over a network.

    Args:
        work: is called until it does not raise.
        what: it does, for messages; without credentials.
        attempts: at most; before each there is a pause, twice as long as the last, give or take a half so that many
            processes do not come back at once.

    Raises:
        Absent: there is nothing.
        DataError: no access, or the last attempt failed too.
        Shorter: if that is what `work` raised, three times.
    """
    began = time.monotonic()
    short, last = 0, BaseException()
    for number in range(attempts):
        if number:
            time.sleep(min(_LONGEST, _FIRST * 2 ** (number - 1)) * random.uniform(0.5, 1.5))
        try:
            return work()
        except Shorter as error:
            last, short = error, short + 1
            if short == _SHORT:
                raise
        except _failures() as error:
            if isinstance(error, FileNotFoundError) or getattr(error, "status", None) in _ABSENT:
                raise Absent(f"{what}: there is no such file.") from error
            why = _final(error)
            if why is not None:
                raise DataError(f"{what}: the server {why}.") from error
            last = error
            log.debug("attempt %d of %d: %s: %s", number + 1, attempts, what, _said(error))
    raise DataError(
        f"{what}: gave up after {attempts} attempts in {time.monotonic() - began:.0f} s; the last: {_said(last)}. "
        "See data.remote.attempts and data.remote.timeout."
    ) from last


def _failures() -> tuple[type[BaseException], ...]:
    """What fsspec's file systems raise of networks; most of it is an OSError."""
    kinds: tuple[type[BaseException], ...] = (OSError, EOFError, TimeoutError, asyncio.TimeoutError)
    try:
        from aiohttp import ClientError
    except ImportError:  # then nothing can raise it
        return kinds
    return (*kinds, ClientError)


def _final(error: BaseException) -> str | None:
    """Why there is no use in trying again; None if there may be."""
    status = getattr(error, "status", None)
    if isinstance(error, PermissionError):
        return _DENIED[403]
    if isinstance(status, int) and 400 <= status < 500 and status not in _AGAIN:
        return _DENIED.get(status, f"answers with status {status}")
    return None


def _said(error: BaseException) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):  # aiohttp's own text has the whole URL
        return f"the server answered with status {status}"
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "the server did not answer in time"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
