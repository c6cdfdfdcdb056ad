"""What a record says of the command that made it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SAY = "import json; from vit_efficient.measure.record import command; print(json.dumps(command()))"


def said(*words: str, folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_as_it_is_typed(tmp_path: Path) -> None:
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "measure.py").write_text(SAY)
    words = ["-m", "tool.measure", "--batch", "1"]
    assert said(*words, folder=tmp_path) == ["python", *words]
    assert said(str(tmp_path / "tool" / "measure.py"), "a=b", folder=tmp_path) == ["python", "measure.py", "a=b"]
