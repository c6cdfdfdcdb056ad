"""What the integration tests share: real commands in real processes, on a digits run small enough for a test."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

SMALL = (
    "model.kwargs={patch_size: 8, depth: 2, embed_dim: 48, num_heads: 3}", "data.batch_size=128",
    "optim.epochs=3", "optim.warmup_epochs=1", "optim.ema=0.9",
)  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where digits are prepared, once for all tests."""
    return Path(os.environ.get("VIT_EFFICIENT_CACHE") or tmp_path_factory.mktemp("cache"))


@pytest.fixture
def launch(tmp_path: Path, cache: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python ...` in an empty folder; what still runs afterwards is killed, with all that it started."""
    running: list[subprocess.Popen[str]] = []

    def begin(*words: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ, "VIT_EFFICIENT_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "160",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def start(launch: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m vit_efficient.COMMAND ...`, or a program by its path, like `launch`."""

    def begin(command: str, *words: str) -> subprocess.Popen[str]:
        return launch(command, *words) if command.endswith(".py") else launch("-m", f"vit_efficient.{command}", *words)

    return begin


@pytest.fixture
def start_with(launch: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.Popen[str]]:
    """Starts `fit` with a fault in it: ``start_with("hang:1:14", *words)``; `inject.py` lists them."""
    return lambda fault, *words: launch(str(Path(__file__).with_name("inject.py")), fault, *words)


@pytest.fixture
def signal_stopped() -> Callable[[subprocess.Popen[str], signal.Signals], None]:
    """Waits until a run with the fault `stop:STEP` has come there, sends its first process a signal, lets all go on."""

    def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
        deadline = time.monotonic() + 240
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            if process.poll() is not None or time.monotonic() > deadline:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(f"the run never came to where it stops itself: {process.communicate()[0]}")
            time.sleep(0.02)
        process.send_signal(number)
        os.killpg(process.pid, signal.SIGCONT)

    return send


@pytest.fixture
def command(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Runs a command to its end and returns what it printed; fails unless it exits with ``code``."""

    def run(name: str, *words: str, code: int = 0) -> str:
        process = start(name, *words)
        printed, _ = process.communicate(timeout=1200)
        assert process.returncode == code, printed
        if code == 2:
            assert "Traceback" not in printed
        return printed

    return run


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to clients: it is bound seconds later."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port")


@pytest.fixture(scope="session")
def small() -> Sequence[str]:
    """Overrides that make a digits run a matter of seconds: 3 epochs of 12 steps."""
    return SMALL
