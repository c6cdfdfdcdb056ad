"""A real HTTP server over a folder, with byte ranges, that misbehaves when told to."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from vit_efficient.data.remote import retry


class Server:
    """What it serves, what it was asked for, and what it shall do wrong.

    Attributes:
        faults: by file, one entry a request that is yet to come: a status, or
            `stall`: no answer at all;
            `trickle`: a byte every 50 ms;
            `drop`: the connection ends after half of the answer;
            `cut`: half of a part, in an answer that is whole in itself;
            `shifted`: a part that begins one byte late;
            `no ranges`: all of the file, whatever was asked for;
            `unsaid`: the same without its length, so that only the connection's end tells the file's.
        always: by file, an entry for every request.
        requests: (method, file, range) of every request.
        authorizations: headers by which somebody said who asks.
        sent: bytes of all answers.
        retry_after: header that goes with a status, if any.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str | int]] = defaultdict(list)
        self.always: dict[str, str | int] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.authorizations: list[str] = []
        self.sent = 0
        self.retry_after: str | None = None
        self.stalled = threading.Event()
        server = self

        class Handler(_Handler):
            here = server

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def count(self, file: str) -> int:
        return sum(asked.endswith(file) for method, asked, _ in self.requests if method == "GET")

    def close(self) -> None:
        self.stalled.set()
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # as many may connect at once


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    here: ClassVar[Server]

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        here, file = self.here, self.path.lstrip("/")
        here.requests.append((self.command, file, self.headers.get("Range")))
        if "Authorization" in self.headers:
            here.authorizations.append(self.headers["Authorization"])
        fault = here.faults[file].pop(0) if here.faults.get(file) else here.always.get(file)
        if fault == "stall":
            here.stalled.wait(20)
            self.close_connection = True
            return
        path = here.folder / file
        if isinstance(fault, int) or not path.is_file():
            self._refuse(fault if isinstance(fault, int) else 404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and fault not in ("no ranges", "unsaid"):
            start, stop = int(asked[1]), min(len(data), int(asked[2] or len(data) - 1) + 1)
            if start >= len(data):
                self._refuse(416)
                return
            start += fault == "shifted"
            stop -= (stop - start) // 2 if fault == "cut" else 0
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
        if fault == "unsaid":
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not body:
            return
        if fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(0.01)
            self.connection.close()
            self.close_connection = True
            return
        with contextlib.suppress(ConnectionError):  # somebody has seen enough
            self._write(data, 1 if fault == "trickle" else 1 << 16)

    def _write(self, data: bytes, block: int) -> None:
        for start in range(0, len(data), block):
            if block == 1 and self.here.stalled.wait(0.05):
                return
            self.here.sent += self.wfile.write(data[start : start + block])

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        if self.here.retry_after is not None:
            self.send_header("Retry-After", self.here.retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy stands between the tests and their server, and no index is left in the user's own folder."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VIT_EFFICIENT_CACHE", str(tmp_path / "own"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts are a tenth as long here."""
    monkeypatch.setattr(retry, "_FIRST", 0.05)


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package impossible to import, whether it is installed or not."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serves `tmp_path / "shards"`."""
    made = Server(tmp_path / "shards")
    yield made
    made.close()
