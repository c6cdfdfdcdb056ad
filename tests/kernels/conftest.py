"""Tests of Triton kernels run on a GPU, and on any machine in Triton's interpreter, which the environment chooses
before Triton is imported: `tests/unit/kernels/test_interpreter.py` runs these files so, in a process of its own."""

from __future__ import annotations

import os
import random
from typing import Any

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


@pytest.fixture(autouse=True)
def _fresh_inputs() -> None:
    """Every run of a test draws other numbers; what pytest prints of a failed one says how to draw them again."""
    seed = int(os.environ.get("KERNEL_TEST_SEED") or random.SystemRandom().randrange(2**32))
    torch.manual_seed(seed)
    print(f"inputs of KERNEL_TEST_SEED={seed}")


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of garbage, so an output that a kernel leaves out shows."""
    plain = torch.empty

    def poisoned(*sizes: Any, **options: Any) -> torch.Tensor:
        made = plain(*sizes, **options)
        made.untyped_storage().fill_(0x7F)  # 127 as int8, NaN as e4m3 and 16 bits, 3e38 as float32
        return made

    monkeypatch.setattr(torch, "empty", poisoned)
