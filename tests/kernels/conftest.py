"""Tests of Triton kernels run on a GPU, and on any machine in Triton's interpreter, which the environment chooses
before Triton is imported: `tests/unit/kernels/test_interpreter.py` runs these files so, in a process of its own."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED or torch.cuda.is_available():
        return
    for item in items:
        if item.path.name.endswith("_triton.py") and item.path.parent.name == "kernels":
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device or Triton's interpreter"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU, or the CPU if they are interpreted."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session")
def interpreted() -> bool:
    """Whether kernels run in the interpreter, which is slow, knows no bfloat16, and truncates where it makes e4m3."""
    return INTERPRETED


@pytest.fixture
def big(interpreted: bool) -> None:
    """For sizes that the interpreter would take minutes for."""
    if interpreted:
        pytest.skip("too large for the interpreter")
