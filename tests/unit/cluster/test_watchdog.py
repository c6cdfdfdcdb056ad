"""No progress for too long is noticed, and where the threads stand is written down."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from vit_efficient.cluster.watchdog import Watchdog


def ask(dog: Watchdog, seconds: float) -> float | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (found := dog.stalled()) is not None:
            return found
        time.sleep(0.02)
    return None


def test_marks_put_it_off(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 3, limit=0.5)
    for _ in range(5):
        dog.mark("a step")
        assert ask(dog, 0.2) is None
    found = ask(dog, 5)
    assert found is not None
    assert found > 0.5


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
        f"dog = Watchdog(Path({str(tmp_path)!r}), 0, limit=0.3); dog.hold_off()\n"
        "if len(sys.argv) > 1: dog.close()\n"
        "ctypes.PyDLL(None).sleep(2)"
    )
    fired, closed = (
        subprocess.run([sys.executable, "-c", code, *word], capture_output=True, text=True) for word in ([], ["close"])
    )
    assert fired.returncode == 1
    assert "File" in fired.stderr
    assert closed.returncode == 0
