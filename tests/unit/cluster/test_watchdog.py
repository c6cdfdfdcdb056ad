"""No progress for too long is noticed, and where the threads stand is written down."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from vit_efficient.cluster import watchdog
from vit_efficient.cluster.watchdog import Watchdog


def test_marks_put_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    dog = Watchdog(tmp_path, 3, limit=60)
    for _ in range(5):
        dog.mark("a step")
        for _ in range(60):
            now[0] += 1
            assert dog.stalled() is None
    now[0] += 1
    assert dog.stalled() == 61


def test_the_stacks_of_all_threads(tmp_path: Path) -> None:
    done = threading.Event()

    def stuck_here() -> None:
        done.wait()

    thread = threading.Thread(target=stuck_here)
    thread.start()
    try:
        dog = Watchdog(tmp_path / "stacks", 3, limit=0.5)
        dog.mark("step 7")
        text = dog.dump("nothing happens").read_text()
    finally:
        done.set()
        thread.join()
    assert dog.path.name == "rank-00003.txt"
    for part in ("stuck_here", "test_the_stacks_of_all_threads", "nothing happens", "step 7"):
        assert part in text


def test_the_last_resort_fires_without_python(tmp_path: Path) -> None:
    code = (
        "import ctypes, sys; from pathlib import Path; from vit_efficient.cluster.watchdog import Watchdog\n"
        f"dog = Watchdog(Path({str(tmp_path)!r}), 0, limit=1.5); dog.hold_off()\n"
        "if len(sys.argv) > 1: dog.close()\n"
        "ctypes.PyDLL(None).sleep(3 if len(sys.argv) > 1 else 60)"
    )
    fired, closed = (
        subprocess.run([sys.executable, "-c", code, *word], capture_output=True, text=True) for word in ([], ["close"])
    )
    assert fired.returncode == 1
    assert "File" in fired.stderr
    assert closed.returncode == 0
