"""What kernels ask of a GPU and of shapes, and how they say that they do not get it."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

FIRST_WITH_TRITON = (8, 0)  # Triton compiles for no older GPU
FIRST_WITH_FP8 = (8, 9)
WIDEST_HEAD = 128


@functools.cache
def compute_capability(index: int | None) -> tuple[int, int]:
    """Of a CUDA device by its index; None: the current one."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def has_triton() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("triton") is not None


def lacks_triton(device: torch.device) -> str | None:
    """Why no Triton kernel runs on a CUDA device; None if they do."""
    if not has_triton():
        return "the package triton is not installed."
    major, minor = compute_capability(device.index)
    if (major, minor) < FIRST_WITH_TRITON:
        return f"Triton compiles for GPUs from sm_80, and this is sm_{major}{minor}."
    return None


def lacks_fp8(device: torch.device) -> str | None:
    """Why no fp8 kernel runs on a CUDA device; None if they do."""
    major, minor = compute_capability(device.index)
    if (major, minor) < FIRST_WITH_FP8:
        return f"sm_{major}{minor} has no fp8 matrix units (they came with sm_89, Ada and Hopper; Ampere has none)."
    return lacks_triton(device)


def too_wide(what: str, *tensors: Tensor) -> str | None:
    """Why heads of this width are refused; None if they are not."""
    width = max(x.shape[-1] for x in tensors)
    return f"{what} has heads up to {WIDEST_HEAD} wide, and these are {width}." if width > WIDEST_HEAD else None
