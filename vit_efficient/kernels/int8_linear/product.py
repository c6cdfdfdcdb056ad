"""The exact product of int8 codes, by the fastest way that is exact on each device.

Shapes: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear import reference
from vit_efficient.kernels.int8_linear.reference import LARGEST_CODE, WIDEST


@torch.library.custom_op("vit_efficient::int8_matmul", mutates_args=())
def int8_matmul(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    """``q_MK @ q_NK.T`` of int8 codes within +-127, exactly, as int32 (M, N).

    Raises:
        ValueError: K is so wide that int32 could overflow.
    """
    if q_MK.shape[1] > WIDEST:
        raise ValueError(f"int8_matmul: {q_MK.shape[1]:,} inputs can overflow int32; {WIDEST:,} is the most.")
    if 0 in (*q_MK.shape, q_NK.shape[0]):  # which libraries refuse
        return q_MK.new_zeros((q_MK.shape[0], q_NK.shape[0]), dtype=torch.int32)
    if q_MK.device.type == "cuda":
        return _cuda_matmul(q_MK, q_NK)
    if q_MK.device.type == "cpu" and cpu_int_mm_is_exact():
        return torch._int_mm(q_MK, q_NK.t())
    return reference.int8_matmul(q_MK, q_NK)


@int8_matmul.register_fake
def _(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    return q_MK.new_empty((q_MK.shape[0], q_NK.shape[0]), dtype=torch.int32)


@torch.compiler.assume_constant_result  # or the compiler would trace the trial into the graph
def cpu_int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` is exact on this processor; tried once, on the operands that strain it most.

    On x86 without VNNI instructions (before Ice Lake and Zen 4, roughly) oneDNN adds pairs of products in 16 bits,
    which saturate: the result is wrong, without a warning. There the exact float32 form is used instead.
    """
    return _tried()


@functools.cache
def _tried() -> bool:
    for m, k, n in ((1, 4096, 32), (33, 63, 17), (64, 192, 64)):
        a_MK = torch.full((m, k), LARGEST_CODE, dtype=torch.int8)
        for sign in (1, -1):
            b_NK = torch.full((n, k), sign * LARGEST_CODE, dtype=torch.int8)
            if not bool((torch._int_mm(a_MK, b_NK.t()) == sign * k * LARGEST_CODE**2).all()):
                return False
    return True


def _cuda_matmul(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    """cuBLASLt wants more than 16 rows, and K and N in eights: pad with zeros, then cut."""
    (m, k), n = q_MK.shape, q_NK.shape[0]
    rows, inputs, outputs = max(0, 17 - m), -k % 8, -n % 8
    if rows or inputs:
        q_MK = F.pad(q_MK, (0, inputs, 0, rows))
    if outputs or inputs:
        q_NK = F.pad(q_NK, (0, inputs, 0, outputs))
    sum_MN = torch._int_mm(q_MK.contiguous(), q_NK.contiguous().t())
    return sum_MN[:m, :n].contiguous() if rows or outputs else sum_MN
