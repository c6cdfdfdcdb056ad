"""The kernel of linear layers on codes: one source for int8, fp8 and 16 bits, and for all that may follow the product.

A persistent grid: each program takes tiles of the output in turn, in groups of `GROUP` rows of tiles, which share the
weight in the cache. With descriptors, operands come through the tensor memory accelerator (sm_90); with pointers, by
ordinary asynchronous copies (sm_80, sm_89, and wherever strides are not multiples of 16 bytes).

What follows the product is chosen by constants, and absent operands are None, so each form compiles to its own code:

    LAYOUT      "rows": (M, N); "heads": (P, B, H, T, E)
    GELU        of the erf form
    QUANT       "none"; "static": a scale for all (rows) or for each part (heads); "token": a scale a token and head
    shift       (rows, static) subtracted before that, a number a column, if there is one
    smooth      (rows, static) divides what is left, likewise; `reciprocal` is 1 / smooth
    residual    added, times `gamma` if there is one

Shapes: M rows (B images of T tokens), K inputs, N outputs: P parts of H heads of width E. A tile is BLOCK_M x BLOCK_N
and starts every STEP_N columns: STEP_N is BLOCK_N, or E where a tile is one head and E is no power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vit_efficient.kernels.device_functions import (
    fetch,
    gelu,
    given_scales,
    of_columns,
    quantize_given,
    quantize_rows,
    quantize_scaled,
    wait_for_previous,
)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP rows of tiles, then on to the next column."""
    together = GROUP * tiles_n
    first = (tile // together) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % together) % rows, (tile % together) // rows


@triton.jit
def _load(x, stride, first_row, k, rows, K, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr,
          ROWS: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """A block of codes (ROWS, BLOCK_K); zeros beyond K. Rows beyond the last are any, and are not stored later."""
    if DESCRIPTORS:
        block = x.load([first_row, k])
    else:
        row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        column = k + tl.arange(0, BLOCK_K)
        at = x + row[:, None] * stride + column[None, :]
        if EVEN:
            block = tl.load(at)
        else:
            block = tl.load(at, mask=(column < K)[None, :], other=0.0)
    return block


@triton.jit
def _vector(at, index, there, MANY: tl.constexpr, SIZE: tl.constexpr):
    """A number for each index, or one for all."""
    if MANY:
        found = tl.load(at + index, mask=there, other=0.0).to(tl.float32)
    else:
        found = tl.load(at).to(tl.float32) + tl.zeros((SIZE,), tl.float32)
    return found


@triton.jit
def _block(x, row, column, there, stride):
    return tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=there, other=0.0)


@triton.jit
def _finish(
    sums, first_row, first_column, end_column, row_scale, column_scale, bias, residual, gamma, out, out_scale, shift,
    smooth, reciprocal, scales, M, N, tokens, residual_stride,
    LAYOUT: tl.constexpr, GELU: tl.constexpr, QUANT: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    ROW_SCALES: tl.constexpr, COLUMN_SCALES: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr,
    RESIDUAL_DESCRIPTOR: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, LOADED: tl.constexpr,
):  # fmt: skip
    """From sums (BLOCK_M, COLUMNS) to what is stored. The order of operations is the definition's.

    LOADED: scales, bias and residual of this tile are given as they are, and not where they lie.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, COLUMNS)
    row_there, column_there = row < M, column < end_column
    there = row_there[:, None] & column_there[None, :]
    if LOADED:
        incoming, of_column, added = row_scale, column_scale, bias
    else:
        incoming = _vector(row_scale, row, row_there, ROW_SCALES, BLOCK_M)
        of_column = _vector(column_scale, column, column_there, COLUMN_SCALES, COLUMNS)
        added = bias
        if bias is not None:
            added = _vector(bias, column, column_there, True, COLUMNS)
    y = sums.to(tl.float32) * incoming[:, None] * of_column[None, :]
    if bias is not None:
        y = y + added[None, :]
    if GELU:
        y = gelu(y)
    if residual is not None:
        if gamma is not None:
            y = tl.load(gamma + column, mask=column_there, other=0.0).to(tl.float32)[None, :] * y
        if LOADED:
            old = residual
        elif RESIDUAL_DESCRIPTOR:
            old = residual.load([first_row, first_column])
        else:
            old = _block(residual, row, column, there, residual_stride)
        y = old.to(tl.float32) + y

    if LAYOUT == "rows":
        if QUANT == "static":
            given = tl.load(out_scale)
            if shift is not None:
                y = y - of_columns(shift, column, column_there, 0.0)
            if GELU:  # not exact itself
                inverse = tl.div_rn(1.0, given)
                if smooth is not None:
                    inverse = inverse * of_columns(reciprocal, column, column_there, 1.0)
                codes = quantize_scaled(y, inverse, LARGEST, INTEGER)
            elif smooth is None:
                codes = quantize_given(y, given, LARGEST, INTEGER)
            else:
                divisor = of_columns(smooth, column, column_there, 1.0)
                inverse = of_columns(reciprocal, column, column_there, 1.0)
                codes = quantize_given(y, given, LARGEST, INTEGER, divisor, inverse)
            if first_column == 0:
                tl.store(scales + row, tl.where(incoming == incoming, given, float("nan")), mask=row_there)
        else:
            codes = y
        if STORE_DESCRIPTOR:
            out.store([first_row, first_column], codes.to(out.dtype))
        else:
            at = out + row.to(tl.int64)[:, None] * N + column[None, :]
            tl.store(at, codes.to(out.dtype.element_ty), mask=there)
    else:
        # Element (row, column) lies at the sum of a term of the row and one of the column.
        part_size = tl.full((), HEADS, tl.int64) * M  # scales of a part
        image, token = row // tokens, row % tokens
        row_at = image.to(tl.int64) * HEADS * tokens + token
        part, head = column // (HEADS * WIDTH), (column // WIDTH) % HEADS
        column_at = (part * part_size + head * tokens) * WIDTH + column % WIDTH
        if QUANT == "none":
            codes = y
        else:
            # (BLOCK_M, heads of this tile, HEAD_BLOCK): what lies beyond a head's width is zero.
            TILE_HEADS: tl.constexpr = COLUMNS // HEAD_BLOCK
            by_head = tl.reshape(tl.where(column_there[None, :], y, 0.0), (BLOCK_M, TILE_HEADS, HEAD_BLOCK))
            index = first_column // WIDTH + tl.arange(0, TILE_HEADS)
            if QUANT == "token":
                codes, made = quantize_rows(by_head, LARGEST, INTEGER)
            else:
                there_too = index * WIDTH < end_column
                given = tl.load(out_scale + index // HEADS, mask=there_too, other=1.0)[None, :]
                codes = quantize_given(by_head, given[:, :, None], LARGEST, INTEGER)
                made = given_scales(by_head, given, INTEGER)
            codes = tl.reshape(codes, (BLOCK_M, COLUMNS))
            at = scales + row_at[:, None] + ((index // HEADS) * part_size + (index % HEADS) * tokens)[None, :]
            tl.store(at, made, mask=row_there[:, None] & (index * WIDTH < end_column)[None, :])
        at = out + (row_at * WIDTH)[:, None] + column_at[None, :]
        tl.store(at, codes.to(out.dtype.element_ty), mask=there)


@triton.jit
def _finish_parts(
    sums, first_row, first_column, end_column, row_scale, column_scale, bias, residual, gamma, out, out_scale, shift,
    smooth, reciprocal, scales, M, N, tokens, residual_stride,
    LAYOUT: tl.constexpr, GELU: tl.constexpr, QUANT: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    ROW_SCALES: tl.constexpr, COLUMN_SCALES: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr,
    RESIDUAL_DESCRIPTOR: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, LOADED: tl.constexpr,
):  # fmt: skip
    """`_finish` in PARTS parts (a power of two), one after the other: fewer registers, less shared memory.

    The compiler works through a tile one operation at a time, and what GELU keeps for 128 x 256 numbers between two
    operations does not fit the registers.
    """
    if PARTS == 1:
        _finish(
            sums, first_row, first_column, end_column, row_scale, column_scale, bias, residual, gamma, out, out_scale,
            shift, smooth, reciprocal, scales, M, N, tokens, residual_stride, LAYOUT, GELU, QUANT, LARGEST, INTEGER,
            ROW_SCALES, COLUMN_SCALES, STORE_DESCRIPTOR, RESIDUAL_DESCRIPTOR, HEADS, WIDTH, HEAD_BLOCK, BLOCK_M,
            COLUMNS, LOADED,
        )  # fmt: skip
    else:
        left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, COLUMNS // 2)), (0, 2, 1)))
        _finish_parts(
            left, first_row, first_column, end_column, row_scale, column_scale, bias, residual, gamma, out, out_scale,
            shift, smooth, reciprocal, scales, M, N, tokens, residual_stride, LAYOUT, GELU, QUANT, LARGEST, INTEGER,
            ROW_SCALES, COLUMN_SCALES, STORE_DESCRIPTOR, RESIDUAL_DESCRIPTOR, HEADS, WIDTH, HEAD_BLOCK, BLOCK_M,
            COLUMNS // 2, PARTS // 2, LOADED,
        )  # fmt: skip
        _finish_parts(
            right, first_row, first_column + COLUMNS // 2, end_column, row_scale, column_scale, bias, residual, gamma,
            out, out_scale, shift, smooth, reciprocal, scales, M, N, tokens, residual_stride, LAYOUT, GELU, QUANT,
            LARGEST, INTEGER, ROW_SCALES, COLUMN_SCALES, STORE_DESCRIPTOR, RESIDUAL_DESCRIPTOR, HEADS, WIDTH,
            HEAD_BLOCK, BLOCK_M, COLUMNS // 2, PARTS // 2, LOADED,
        )  # fmt: skip


@triton.jit
def _product(
    a, b, first_row, first_column, M, N, K, a_stride, b_stride,
    FP8: tl.constexpr, PROMOTE: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums (BLOCK_M, BLOCK_N) of one tile."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if FP8 else tl.int32)
    for k in range(0, K, BLOCK_K):
        x = _load(a, a_stride, first_row, k, M, K, DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_K)
        w = _load(b, b_stride, first_column, k, N, K, DESCRIPTORS, EVEN_K, BLOCK_N, BLOCK_K)
        if not FP8:
            sums = tl.dot(x, w.T, sums, out_dtype=tl.int32)
        elif not PROMOTE:
            sums = tl.dot(x, w.T, sums, out_dtype=tl.float32)
        elif DESCRIPTORS:
            sums = tl.dot(x, w.T, sums, out_dtype=tl.float32, max_num_imprecise_acc=PROMOTE)
        else:  # the compiler promotes Hopper's sums only; with this argument it leaves the addition where it is
            sums += tl.dot(x, w.T, out_dtype=tl.float32, max_num_imprecise_acc=PROMOTE)
    return sums


@triton.jit
def linear_kernel(
    a, b, row_scale, column_scale, bias, residual, gamma, out, out_scale, shift, smooth, reciprocal, scales, weights,
    M, N, K, a_stride, b_stride, residual_stride, tokens,
    FP8: tl.constexpr, PROMOTE: tl.constexpr,
    LAYOUT: tl.constexpr, GELU: tl.constexpr, QUANT: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    ROW_SCALES: tl.constexpr, COLUMN_SCALES: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr, RESIDUAL_DESCRIPTOR: tl.constexpr, EVEN_K: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEP_N: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, ALONE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """See the module. `a` and `b` are descriptors or pointers, as DESCRIPTORS says; `out` as STORE_DESCRIPTOR says, and
    `residual` as RESIDUAL_DESCRIPTOR does: as its part of the sums lies, a thread would load four bytes at a time.

    PROMOTE: products that fp8 units sum in their fewer bits before float32 takes over (by pointers, BLOCK_K of them if
    that is more); 0: all of them. Operands of 16 bits pass for fp8 with scales of 1 and PROMOTE = 0. PARTS: that a tile
    is finished in, side by side. ALONE: each program has one tile, whole; what its end needs is loaded before the
    product, and waits for nothing behind it. `weights`, if given (ALONE and OVERLAP): the pointer behind `b`, gapless,
    for what comes into the cache while the kernel before still runs.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, STEP_N)
    if weights is not None:
        early_m, early_n = _place(tl.program_id(0), tiles_m, tiles_n, GROUP)
        early = early_n * STEP_N
        size = tl.minimum(STEP_N, N - early) * K
        fetch(weights + early.to(tl.int64) * K, size, early_m, tiles_m)  # tiles of one column share them
    wait_for_previous(OVERLAP)
    tl.assume(K > 0)  # or the flattened loop has a second epilogue, for sums of nothing
    if ALONE:
        tile_m, tile_n = _place(tl.program_id(0), tiles_m, tiles_n, GROUP)
        first_row, first_column = tile_m * BLOCK_M, tile_n * STEP_N
        end_column = tl.minimum(N, first_column + STEP_N)
        row, column = first_row + tl.arange(0, BLOCK_M), first_column + tl.arange(0, BLOCK_N)
        rows = _vector(row_scale, row, row < M, ROW_SCALES, BLOCK_M)
        columns = _vector(column_scale, column, column < end_column, COLUMN_SCALES, BLOCK_N)
        added, old = bias, residual
        if bias is not None:
            added = _vector(bias, column, column < end_column, True, BLOCK_N)
        if residual is not None:
            there = (row < M)[:, None] & (column < end_column)[None, :]
            old = _block(residual, row, column, there, residual_stride)
        sums = _product(
            a, b, first_row, first_column, M, N, K, a_stride, b_stride,
            FP8, PROMOTE, DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _finish(
            sums, first_row, first_column, end_column, rows, columns, added, old, gamma, out, out_scale,
            shift, smooth, reciprocal, scales, M, N, tokens, residual_stride, LAYOUT, GELU, QUANT, LARGEST, INTEGER,
            ROW_SCALES, COLUMN_SCALES, STORE_DESCRIPTOR, RESIDUAL_DESCRIPTOR, HEADS, WIDTH, HEAD_BLOCK, BLOCK_M,
            BLOCK_N, True,
        )  # fmt: skip
    else:
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=DESCRIPTORS):
            tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
            first_row, first_column = tile_m * BLOCK_M, tile_n * STEP_N
            sums = _product(
                a, b, first_row, first_column, M, N, K, a_stride, b_stride,
                FP8, PROMOTE, DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            end_column = tl.minimum(N, first_column + STEP_N)
            _finish_parts(
                sums, first_row, first_column, end_column, row_scale, column_scale, bias, residual, gamma, out,
                out_scale, shift, smooth, reciprocal, scales, M, N, tokens, residual_stride, LAYOUT, GELU, QUANT,
                LARGEST, INTEGER, ROW_SCALES, COLUMN_SCALES, STORE_DESCRIPTOR, RESIDUAL_DESCRIPTOR, HEADS, WIDTH,
                HEAD_BLOCK, BLOCK_M, BLOCK_N, PARTS, False,
            )  # fmt: skip
