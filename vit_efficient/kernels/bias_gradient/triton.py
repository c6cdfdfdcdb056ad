"""Gradients and their sums over rows in one pass: a program goes down a strip of columns, and sums what it writes.

Sums of programs are added up by PyTorch, in one order, so that equal inputs give equal sums.

Shapes: M rows (images x tokens), N columns, B batch, H heads, T tokens, E head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vit_efficient.kernels.device_functions import gelu_slope
from vit_efficient.kernels.overlap import processors

GELU_ROWS, GELU_COLUMNS = 8, 512  # that a program holds at once
HEAD_ROWS = 64
PROGRAMS = 4  # a multiprocessor, so that enough loads are under way


@triton.jit
def _gelu_kernel(grad, x, out, sums, M, N, share, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, share, BLOCK_M):
        row = tl.program_id(1) * share + first + tl.arange(0, BLOCK_M)
        there = (row < M)[:, None] & (column < N)[None, :]
        place = row.to(tl.int64)[:, None] * N + column[None, :]
        y = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        made = tl.load(grad + place, mask=there, other=0.0).to(tl.float32) * gelu_slope(y)
        tl.store(out + place, made.to(out.dtype.element_ty), mask=there)
        total += made
    tl.store(sums + tl.program_id(1) * N + column, tl.sum(total, 0), mask=column < N)


@triton.jit
def _heads_kernel(
    q, k, v, out, sums, M, T, H, E, s_b, s_h, s_t, share, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    part = tl.program_id(0) // H
    head = (tl.program_id(0) % H).to(tl.int64)
    source = v
    if part == 0:
        source = q
    if part == 1:
        source = k
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for first in range(0, share, BLOCK_M):
        row = tl.program_id(1) * share + first + tl.arange(0, BLOCK_M)
        there = (row < M)[:, None] & (e < E)[None, :]
        place = (row // T).to(tl.int64) * s_b + (row % T).to(tl.int64) * s_t + head * s_h
        made = tl.load(source + place[:, None] + e[None, :], mask=there, other=0.0)
        to = row.to(tl.int64) * (3 * H * E) + tl.program_id(0) * E
        tl.store(out + to[:, None] + e[None, :], made, mask=there)
        total += made.to(tl.float32)
    tl.store(sums + (tl.program_id(1) * 3 * H + tl.program_id(0)) * E + e, tl.sum(total, 0), mask=e < E)


def _shares(rows: int, strips: int, block: int, device: torch.device) -> tuple[int, int]:
    """How many parts rows are cut into, and the rows of a part, which are whole blocks."""
    parts = max(1, processors(device, 1) * PROGRAMS // strips)
    share = triton.cdiv(triton.cdiv(rows, parts), block) * block
    return triton.cdiv(rows, share), share


def gelu_gradient(grad_MN: Tensor, x_MN: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.gelu_gradient`, of one row at least."""
    grad_MN, x_MN = grad_MN.contiguous(), x_MN.contiguous()
    rows, columns = x_MN.shape
    strips = triton.cdiv(columns, GELU_COLUMNS)
    shares, share = _shares(rows, strips, GELU_ROWS, x_MN.device)
    out_MN = torch.empty((rows, columns), dtype=grad_MN.dtype, device=x_MN.device)
    sums = torch.empty((shares, columns), dtype=torch.float32, device=x_MN.device)
    with torch.cuda.device_of(x_MN):
        _gelu_kernel[(strips, shares)](
            grad_MN, x_MN, out_MN, sums, rows, columns, share,
            BLOCK_M=GELU_ROWS, BLOCK_N=GELU_COLUMNS, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out_MN, sums.sum(0)


def heads_gradient(q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.heads_gradient`, of one row at least."""
    given = q_BHTE, k_BHTE, v_BHTE
    if len({x.stride() for x in given}) > 1 or q_BHTE.stride(3) != 1:  # the kernel has one set of strides for all
        given = q_BHTE.contiguous(), k_BHTE.contiguous(), v_BHTE.contiguous()
    batch, heads, tokens, width = q_BHTE.shape
    rows, columns = batch * tokens, 3 * heads * width
    shares, share = _shares(rows, 3 * heads, HEAD_ROWS, q_BHTE.device)
    out = torch.empty((rows, columns), dtype=q_BHTE.dtype, device=q_BHTE.device)
    sums = torch.empty((shares, columns), dtype=torch.float32, device=q_BHTE.device)
    with torch.cuda.device_of(q_BHTE):
        _heads_kernel[(3 * heads, shares)](
            *given, out, sums, rows, tokens, heads, width, *given[0].stride()[:3], share,
            BLOCK_M=HEAD_ROWS, BLOCK_E=triton.next_power_of_2(width), enable_fp_fusion=False,
        )  # fmt: skip
    return out, sums.sum(0)
