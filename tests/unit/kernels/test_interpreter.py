"""Kernels in Triton's interpreter: the files of tests/kernels that end in `_triton.py`, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
FILES = sorted(path.name for path in FOLDER.glob("test_*_triton.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_kernels_are_right_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
        str(FOLDER / name),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[1], check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
