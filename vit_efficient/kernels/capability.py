"""What kernels ask of a GPU and of shapes, and how they say that they do not get it."""

from __future__ import annotations

import functools
import importlib.util
import math

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


def check_operands(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHMF: Tensor, *scales: tuple[str, Tensor, Tensor | None], what: str
) -> None:
    """Refuse queries, keys and values of attention that do not fit each other; kernels would read beyond them.

    Args:
        scales: a word for the operand, the operand (B, H, tokens, width), and its scales: None, one number, or one a
            token and head.

    Raises:
        ValueError: other batches, heads or lengths.
    """
    shapes = [tuple(x.shape) for x in (q_BHNE, k_BHME, v_BHMF)]
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(f"{what}: queries, keys and values are {shapes}; wanted are (batch, heads, tokens, width)")
    q, k, v = shapes
    if q[:2] != k[:2] or k[:3] != v[:3] or q[3] != k[3]:
        raise ValueError(
            f"{what}: queries are {q}, keys {k} and values {v}. All must have the same batch and heads, keys and "
            "values one length, queries and keys one width."
        )
    for name, x, scale in scales:
        # A product, since a compiler that does not know the number of images cannot compare it with 1.
        if scale is not None and (scale.numel() - 1) * (scale.numel() - math.prod(x.shape[:-1])) != 0:
            raise ValueError(f"{what}: {name} are {tuple(x.shape)} and their scales {tuple(scale.shape)}")


def too_wide(what: str, *tensors: Tensor) -> str | None:
    """Why heads of this width are refused; None if they are not."""
    width = max(x.shape[-1] for x in tensors)
    return f"{what} has heads up to {WIDEST_HEAD} wide, and these are {width}." if width > WIDEST_HEAD else None
