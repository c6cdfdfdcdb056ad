"""A real HTTP server over a folder, with byte ranges, that misbehaves when told to."""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest


class Server:
    """What it serves, what it was asked for, and what it shall do wrong.

    Attributes:
        faults: by file, one entry a request that is yet to come: `stall`, `drop` or a status.
        always: by file, an entry for every request; also `no ranges`.
        requests: (method, file, range) of every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str | int]] = defaultdict(list)
        self.always: dict[str, str | int] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.stalled = threading.Event()
        server = self

        class Handler(_Handler):
            here = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def count(self, file: str) -> int:
        return sum(asked.endswith(file) for method, asked, _ in self.requests if method == "GET")

    def close(self) -> None:
        self.stalled.set()
        self._http.shutdown()
        self._http.server_close()


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
        fault = here.faults[file].pop(0) if here.faults.get(file) else here.always.get(file)
        if fault == "stall":
            here.stalled.wait(20)
            self.close_connection = True
            return
        path = here.folder / file
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and fault != "no ranges":
            start, stop = int(asked[1]), min(len(data), int(asked[2] or len(data) - 1) + 1)
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            data = data[start:stop]
        else:
            self.send_response(200)
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
        self.wfile.write(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Serves `tmp_path / "shards"`."""
    made = Server(tmp_path / "shards")
    yield made
    made.close()
