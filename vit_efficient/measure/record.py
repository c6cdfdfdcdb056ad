"""The conditions under which a number was measured."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vit_efficient import __version__
from vit_efficient.machine import Machine


def commit() -> str | None:
    """The git commit of the package's own checkout, with ``+changes`` where files differ; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", str(Path(__file__).resolve())):
            return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # not a checkout, or no git: the version has to do
    return None


def command() -> list[str]:
    """What was typed: ``python -m vit_efficient.benchmark ...``, without the folder that it lies in."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]
    return ["python", *program, *sys.argv[1:]]


def environment(machine: Machine) -> dict[str, Any]:
    """Versions, commit, GPUs and arithmetic switches, as plain values for a JSON file."""
    return {
        "vit_efficient": __version__,
        "commit": commit(),
        "command": command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(machine.packages),
        "gpus": [{"name": g.name, "capability": list(g.capability), "memory": g.memory} for g in machine.gpus],
        "driver": machine.driver or None,
        "cuda": torch.version.cuda,
        "cpu_cores": machine.cores,
        "torch_threads": torch.get_num_threads(),
        "tf32": torch.get_float32_matmul_precision() != "highest",
    }
