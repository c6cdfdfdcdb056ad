"""Quantization of rows in one pass. Shapes: M rows, K columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vit_efficient.kernels.device_functions import divide, of_columns, quantize_block, wait_for_previous
from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.overlap import overlap
from vit_efficient.kernels.rows import row_launch, vector, with_rows


@triton.jit
def _kernel(
    x, given, shift, smooth, reciprocal, codes, scales, beyond, M, K, x_stride,
    QUANT: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    used = column < K
    there = (row < M)[:, None] & used[None, :]
    y = tl.load(x + row[:, None] * x_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    if shift is not None:
        y = y - of_columns(shift, column, used, 0.0)
    if smooth is None:
        q, scale = quantize_block(y, given, QUANT, LARGEST, INTEGER)
    else:
        divisor, inverse = of_columns(smooth, column, used, 1.0), of_columns(reciprocal, column, used, 1.0)
        q, scale = quantize_block(y, given, QUANT, LARGEST, INTEGER, divisor, inverse)
    tl.store(codes + row[:, None] * K + column[None, :], q, mask=there)
    tl.store(scales + row, scale, mask=row < M)
    if beyond is not None:
        step = tl.load(given)
        # Rounding to even takes LARGEST + 0.5 to the next code. An infinity's quotient is no number, but is beyond.
        far = (tl.abs(divide(y, step, tl.div_rn(1.0, step))) < LARGEST + 0.5) == 0
        tl.store(beyond + row[:, None] * K + column[None, :], (far & (y == y)).to(tl.int8), mask=there)


@triton.jit
def _dequantize_kernel(
    codes, scales, y, M, K, stride, ROW_SCALES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = (row < M)[:, None] & (column < K)[None, :]
    value = tl.load(codes + row[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    if ROW_SCALES:
        value = value * tl.load(scales + row, mask=row < M, other=0.0)[:, None]
    else:
        value = value * tl.load(scales)
    tl.store(y + row[:, None] * K + column[None, :], value.to(y.dtype.element_ty), mask=there)


def quantize(
    x_MK: Tensor,
    form: str,
    scale: Tensor | None,
    shift_K: Tensor | None = None,
    smooth_K: Tensor | None = None,
    reciprocal_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.quantize` of a matrix. `reciprocal_K` is ``1 / smooth_K``."""
    return _launch(x_MK, form, scale, None, vector(shift_K), vector(smooth_K), vector(reciprocal_K))


def quantize_clipping(x_MK: Tensor, form: str, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.quantize` of a matrix to integers, and `reference.beyond`."""
    beyond = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
    return *_launch(x_MK, form, scale, beyond), beyond.view(torch.bool)


def _launch(
    x_MK: Tensor,
    form: str,
    scale: Tensor | None,
    beyond: Tensor | None,
    shift_K: Tensor | None = None,
    smooth_K: Tensor | None = None,
    reciprocal_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    chosen = format_of(form)
    x_MK = with_rows(x_MK)
    rows, columns = x_MK.shape
    codes = torch.empty(x_MK.shape, dtype=chosen.dtype, device=x_MK.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x_MK.device)
    plan = row_launch(rows, columns, x_MK.device)
    with torch.cuda.device_of(x_MK):
        _kernel[(plan.programs,)](
            x_MK, scale, shift_K, smooth_K, reciprocal_K, codes, scales, beyond, rows, columns, x_MK.stride(0),
            QUANT="token" if scale is None else "static", LARGEST=chosen.largest, INTEGER=chosen.is_integer,
            ROWS=plan.rows, BLOCK=plan.block, num_warps=plan.warps, enable_fp_fusion=False, **overlap(x_MK.device),
        )  # fmt: skip
    return codes, scales


def dequantize(codes_MK: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize` of a matrix."""
    codes_MK, scales = with_rows(codes_MK), scales.contiguous()
    rows, columns = codes_MK.shape
    y_MK = torch.empty((rows, columns), dtype=dtype, device=codes_MK.device)
    plan = row_launch(rows, columns, codes_MK.device)
    with torch.cuda.device_of(codes_MK):
        _dequantize_kernel[(plan.programs,)](
            codes_MK, scales, y_MK, rows, columns, codes_MK.stride(0), ROW_SCALES=scales.numel() > 1,
            ROWS=plan.rows, BLOCK=plan.block, num_warps=plan.warps, enable_fp_fusion=False,
            **overlap(codes_MK.device),
        )  # fmt: skip
    return y_MK
