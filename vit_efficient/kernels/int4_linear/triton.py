"""Linear layers with 4-bit weights on a GPU: two codes a byte are read, unpacked in registers, and multiplied.

For few rows the weight's bytes decide, and they are read once for every `block_m` rows. What follows from that:

- The product is taken the other way round, ``y^T = w x^T``: outputs lie along the side of a matrix instruction that is
  64 long whatever happens, rows along the one that may be as short as 16.
- Few rows and outputs make fewer tiles than there are multiprocessors. Then the groups of inputs are split among
  programs, each writes its float32 sums, and a second small kernel adds them, always in the same order.
- A step takes one group of inputs, so there is one scale (and zero point) for each row of a tile, and integer sums of a
  group are complete when they are scaled.

Shapes: M rows, K inputs, N outputs, G groups of inputs, S parts that inputs are split into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vit_efficient.kernels.overlap import processors
from vit_efficient.kernels.quantize.triton import quantize
from vit_efficient.kernels.rows import with_rows
from vit_efficient.kernels.tuning import Shape, choose

FILLED = 2  # programs a multiprocessor below which inputs are split
# As the bits of a float32, this with a code in its low bits is 2**23 + code: a conversion that is no conversion.
MAGIC = tl.constexpr(0x4B000000)
MAGIC_VALUE = tl.constexpr(8388608.0)
SPLIT_MOST = ((16, 8), (64, 4), (256, 2))  # up to so many rows, inputs are split into so many parts at most


@triton.jit
def _finish(sum_mn, x_scale, bias, m, n, M, N, INTEGER: tl.constexpr):
    """The epilogue, in the order of the definition; the bias has the result's dtype already."""
    if INTEGER:
        sum_mn = sum_mn * tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    if bias is not None:
        sum_mn = sum_mn + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return sum_mn


@triton.jit
def int4_kernel(
    x, x_scale, packed, scale, zero, bias, y, partial, M, N, K, width, G, x_stride,
    GROUP: tl.constexpr, PARTS: tl.constexpr, INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`BLOCK_M` rows and `BLOCK_N` outputs, over the groups of one part.

    Args:
        x: (M, K), codes if `INTEGER`, else in the dtype that is multiplied in.
        packed: (N, width), contiguous; width is ceil(K / 2).
        scale: (N, G); `zero` likewise, or None.
        partial: (S, M, N) float32 where inputs are split, else None.
    """
    columns = tl.cdiv(N, BLOCK_N)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    each = tl.cdiv(G, PARTS)
    first, last = part * each, min(part * each + each, G)
    within, pairs = tl.arange(0, GROUP), tl.arange(0, GROUP // 2)
    x_rows = x + m[:, None].to(tl.int64) * x_stride
    w_rows = packed + n[:, None].to(tl.int64) * width
    acc_nm = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tl.assume(first < last)  # so that matrix instructions stay in flight around the loop
    for g in tl.range(first, last, num_stages=STAGES):
        k, c = g * GROUP + within, g * (GROUP // 2) + pairs
        both = tl.load(w_rows + c[None, :], mask=(n < N)[:, None] & (c < width)[None, :], other=0)
        x_mk = tl.load(x_rows + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        scale_n = tl.load(scale + n * G + g, mask=n < N, other=0.0).to(tl.float32)
        if zero is None:
            zero_n = tl.full((BLOCK_N,), 8, tl.uint8)
        else:
            zero_n = tl.load(zero + n * G + g, mask=n < N, other=0)
        stored_nk = tl.interleave(both & 15, both >> 4)
        if INTEGER:
            sum_nm = tl.dot(stored_nk.to(tl.int8) - zero_n.to(tl.int8)[:, None], tl.trans(x_mk), out_dtype=tl.int32)
            acc_nm += sum_nm.to(tl.float32) * scale_n[:, None]
        else:
            value_nk = (stored_nk.to(tl.int32) | MAGIC).to(tl.float32, bitcast=True)
            w_nk = (value_nk - (zero_n.to(tl.float32) + MAGIC_VALUE)[:, None]) * scale_n[:, None]
            acc_nm = tl.dot(w_nk.to(x_mk.dtype), tl.trans(x_mk), acc_nm, input_precision="ieee")
    y_mn = tl.trans(acc_nm)
    place = m[:, None].to(tl.int64) * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if PARTS > 1:
        tl.store(partial + part.to(tl.int64) * M * N + place, y_mn, mask=inside)
    else:
        y_mn = _finish(y_mn, x_scale, bias, m, n, M, N, INTEGER)
        tl.store(y + place, y_mn.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_parts_kernel(partial, x_scale, bias, y, M, N, PARTS: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr):
    """One row and `BLOCK` outputs: the sums of all parts, from the first to the last, and the epilogue."""
    m = tl.program_id(0) + tl.arange(0, 1)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, inside = m[:, None].to(tl.int64) * N + n[None, :], (n < N)[None, :]
    size = tl.full((), N, tl.int64) * M  # either may be 1, and a constant
    sum_mn = tl.zeros((1, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        sum_mn += tl.load(partial + size * part + place, mask=inside, other=0.0)
    sum_mn = _finish(sum_mn, x_scale, bias, m, n, M, N, INTEGER)
    tl.store(y + place, sum_mn.to(y.dtype.element_ty), mask=inside)


def parts(rows: int, tiles: int, groups: int, processors: int) -> int:
    """How many parts the inputs are split into: enough to fill the GPU, few enough that adding them stays cheap."""
    most = next((parts for up_to, parts in SPLIT_MOST if rows <= up_to), 1)
    wanted = max(1, min(most, groups, FILLED * processors // tiles))
    return -(-groups // -(-groups // wanted))  # none of them empty


def int4_linear(
    x_MK: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    group: int,
    activations: str,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.int4_linear`."""
    weight = packed_NK, scale_NG, zero_NG
    if activations == "token":
        q_MK, scale_M1 = quantize(x_MK, "int8", None)
        return int4_linear_codes(q_MK, scale_M1, *weight, bias_N, group, dtype)
    return _launch(x_MK.to(dtype), None, *weight, None if bias_N is None else bias_N.to(dtype), group, dtype)


def int4_linear_codes(
    q_MK: Tensor,
    scale_M1: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.int4_linear_codes`."""
    scale_M1 = scale_M1.expand(q_MK.shape[0], 1).contiguous()
    return _launch(q_MK, scale_M1, packed_NK, scale_NG, zero_NG, bias_N, group, dtype)


def _launch(
    x_MK: Tensor,
    x_scale: Tensor | None,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """The product of codes with their scales, or of what has the dtype that is multiplied in, and no scales."""
    (rows, inputs), (outputs, groups) = x_MK.shape, scale_NG.shape
    x_MK, integer = with_rows(x_MK), x_scale is not None
    tile = choose("int4_linear", x_MK.device, Shape(rows, inputs, outputs))
    tiles = -(-rows // tile.block_m) * -(-outputs // tile.block_n)
    split = parts(rows, tiles, groups, processors(x_MK.device, 2))
    y_MN = torch.empty((rows, outputs), dtype=dtype, device=x_MK.device)
    partial = torch.empty((split, rows, outputs), device=x_MK.device) if split > 1 else None
    with torch.cuda.device_of(x_MK):
        int4_kernel[(tiles, split)](
            x_MK, x_scale, packed_NK.contiguous(), scale_NG.contiguous(),
            None if zero_NG is None else zero_NG.contiguous(), bias_N, y_MN, partial,
            rows, outputs, inputs, packed_NK.shape[1], groups, x_MK.stride(0),
            GROUP=group, PARTS=split, INTEGER=integer, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
        if partial is not None:
            block = 256
            add_parts_kernel[(rows, -(-outputs // block))](
                partial, x_scale, bias_N, y_MN, rows, outputs, PARTS=split, INTEGER=integer, BLOCK=block,
                num_warps=2, enable_fp_fusion=False,
            )  # fmt: skip
    return y_MN
