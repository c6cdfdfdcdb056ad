"""Tries again what a network may have spoilt, and says at once what no trying mends."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from vit_efficient.data.remote.config import RemoteConfig
from vit_efficient.errors import DataError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_FIRST, _LONGEST = 0.5, 30.0  # seconds


class Refused(OSError):  # noqa: N818 - named for what the server did
    """The server will not give it, however often it is asked; the text goes on after "the server"."""


class Busy(OSError):  # noqa: N818 - likewise
    """The server cannot give it now.

    Args:
        message: says why.
        wait: seconds that it asks to be left alone.
    """

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Absent(DataError):  # noqa: N818 - named for the thing
    """There is no such file."""


def with_retries(work: Callable[[float], _T], what: str, config: RemoteConfig) -> _T:
    """Do something over a network.

    Between two attempts there is a pause, each twice as long as the one before, give or take a half so that many
    processes do not come back at once.

    Args:
        work: called with the seconds that it may take, until it raises no `OSError`.
        what: it does, for messages; without credentials.
        config: how often, and for how long.

    Raises:
        Absent: there is nothing.
        DataError: no access, or the last attempt failed too.
    """
    began, tried = time.monotonic(), 0
    while True:
        tried += 1
        try:
            return work(began + config.patience - time.monotonic())
        except FileNotFoundError as error:
            raise Absent(f"{what}: there is no such file.") from error
        except Refused as error:
            raise DataError(f"{what}: the server {error}.") from error
        except PermissionError as error:
            raise DataError(f"{what}: the server refuses access{f' ({error})' if str(error) else ''}.") from error
        except OSError as error:
            log.debug("attempt %d of %d: %s: %s", tried, config.attempts, what, said(error))
            pause = _pause(tried, error)
            spent = time.monotonic() - began
            if tried == config.attempts or spent + pause >= config.patience:
                raise DataError(
                    f"{what}: gave up after {tried} attempt{'s' * (tried > 1)} in {spent:.0f} s; the last: "
                    f"{said(error)}. See data.remote.attempts, data.remote.timeout and data.remote.patience."
                ) from error
        time.sleep(pause)


def _pause(tried: int, error: OSError) -> float:
    asked = error.wait if isinstance(error, Busy) else 0.0
    return max(min(asked, _LONGEST), min(_LONGEST, _FIRST * 2 ** (tried - 1)) * random.uniform(0.5, 1.5))


def said(error: OSError) -> str:
    """An error's text, or what stands for it."""
    if isinstance(error, TimeoutError):
        return "the server did not answer in time"
    return str(error) or type(error).__name__
