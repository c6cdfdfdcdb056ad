"""Which devices run the Triton kernels."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from vit_efficient.errors import UserError

FIRST_WITH_TRITON = (8, 0)  # compute capability; Triton has dropped what came before
FIRST_WITH_FP8 = (8, 9)


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it exists for Linux only."""
    return importlib.util.find_spec("triton") is not None


def runs_triton(x: Tensor) -> bool:
    """Whether kernels of this package run where `x` is; elsewhere their definitions in plain PyTorch do."""
    return x.device.type == "cuda" and has_triton() and capability(x.device.index) >= FIRST_WITH_TRITON


def require_fp8(x: Tensor) -> None:
    """Refuse fp8 products on GPUs without units for them.

    Raises:
        UserError: `x` is on a GPU before sm_89.
    """
    if x.device.type != "cuda":
        return
    found = capability(x.device.index)
    if found < FIRST_WITH_FP8:
        raise UserError(
            f"fp8 was asked for on {torch.cuda.get_device_name(x.device)} (sm_{found[0]}{found[1]}), which has no fp8 "
            "matrix units: those begin with sm_89 (Ada, Hopper). Use quantization=int8 there."
        )
