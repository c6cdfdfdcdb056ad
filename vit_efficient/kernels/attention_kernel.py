"""The attention kernel that int8 and fp8 attention share (Triton): online softmax over blocks of quantized keys.

After FlashAttention-2 (Dao, arXiv:2307.08691, algorithm 1): one program holds `BLOCK_M` queries of one head and walks
over the keys. What is particular here:

- Queries are quantized in registers, once a program: their rows are whole in it, so neither their codes nor their
  scales pass through memory. Keys are not: all programs of a head would quantize all of its keys again, which costs as
  much arithmetic as the softmax of 128 queries. They come as codes (`attention_operands`).
- Keys beyond M are masked to minus infinity, in the last step only. That step is as narrow as it can be (`TAIL` keys):
  197 keys are 128 + 64 + 16, and not 256.
- Where keys have one scale a block, it goes into the factor of the exponential: one product less for each logit.
- e4m3 values have one scale a block; it goes into the factor that rescales the sum so far, which is there anyway.

Softmax is what limits it: at a head width of 64 a logit costs 256 operations of the matrix units, which take the time
of about 4 instructions of the other units, and it needs 8 to 10 of those (conversion, scale, maximum, exponent, power,
sum, rounding, and its share of the rescaling). So programs are small (64 queries, 4 warps) and several on a
multiprocessor: one's products run beside another's softmax. A grid of plain programs does that by itself; a persistent
one would have to be pipelined across tiles by hand.

Legend: B batch, H heads, N queries, M keys, E width of queries and keys, F width of values. Suffix `_mn`: a tile of
that shape (m queries, n keys, e and f widths).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vit_efficient.kernels.device_functions import given_scales, quantize_given, quantize_rows

SCALED = tl.constexpr(128)  # attention_values.BLOCK: keys that share a scale


@triton.jit
def rotated(x_me, rotation_ptr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, BLOCK_E: tl.constexpr):
    """``x R`` in float32, with R (WIDTH, ROTATED) of +-1, contiguous, in the dtype of x; or x itself (`ROTATED` 0)."""
    if ROTATED > 0:
        rows, columns = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_E)
        inside = (rows < WIDTH)[:, None] & (columns < ROTATED)[None, :]
        r_ee = tl.load(rotation_ptr + rows[:, None] * ROTATED + columns[None, :], mask=inside, other=0.0)
        y_me = tl.dot(x_me, r_ee, input_precision="ieee", out_dtype=tl.float32)
    else:
        y_me = x_me.to(tl.float32)
    return y_me


@triton.jit
def _step(
    acc_mf, sum_m, max_m, value_scale, q_me, factor_m, k, k_scale, v, v_scale,
    batch, head, start, M, stride_kn, stride_vn, stride_vf, stride_ks,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, TOKEN_SCALES: tl.constexpr, FP8_VALUES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`BLOCK` more keys, from `start` on."""
    n = start + tl.arange(0, BLOCK)
    e, f = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    there = n < M
    if TMA:
        k_ne = tl.reshape(k.load([batch, head, start, 0]), (BLOCK, BLOCK_E))
    else:
        k_ptrs = k + n[:, None].to(tl.int64) * stride_kn + e[None, :]
        if MASKED or WIDTH_K != BLOCK_E:
            k_ne = tl.load(k_ptrs, mask=there[:, None] & (e < WIDTH_K)[None, :], other=0.0)
        else:
            k_ne = tl.load(k_ptrs)
    INTEGER: tl.constexpr = k_ne.dtype == tl.int8
    x_mn = tl.dot(q_me, tl.trans(k_ne), out_dtype=tl.int32 if INTEGER else tl.float32).to(tl.float32)
    if TOKEN_SCALES:
        if MASKED:
            scale_n = tl.load(k_scale + n * stride_ks, mask=there, other=0.0)
        else:
            scale_n = tl.load(k_scale + n * stride_ks)
        x_mn = x_mn * scale_n[None, :]
        row_m = factor_m
    else:
        row_m = factor_m * tl.load(k_scale + (start // SCALED) * stride_ks)
    SHIFT: tl.constexpr = 8.0 if FP8_VALUES else 0.0  # e4m3 weights are 2**8 = attention_values.WEIGHT times as large
    if MASKED:  # after the factor: that may have been flushed to 0, and 0 times infinity is not a number
        s_mn = tl.where(there[None, :], x_mn * row_m[:, None], float("-inf"))
        new_m = tl.maximum(max_m, tl.max(s_mn, 1))
        p_mn = tl.exp2(s_mn - (new_m - SHIFT)[:, None])
    else:  # factors are not negative, so the largest sum gives the largest logit
        new_m = tl.maximum(max_m, tl.max(x_mn, 1) * row_m)
        p_mn = tl.exp2(tl.fma(x_mn, row_m[:, None], (SHIFT - new_m)[:, None]))
    shrink_m = tl.exp2(max_m - new_m)
    sum_m = sum_m * shrink_m + tl.sum(p_mn, 1)
    if FP8_VALUES:  # v: (F, M), because fp8 units want the dimension that is summed over to be contiguous
        if TMA:
            v_fn = tl.reshape(v.load([batch, head, 0, start]), (BLOCK_F, BLOCK))
        else:
            v_ptrs = v + f[:, None] * stride_vf + n[None, :]
            if MASKED or WIDTH_V != BLOCK_F:
                v_fn = tl.load(v_ptrs, mask=(f < WIDTH_V)[:, None] & there[None, :], other=0.0)
            else:
                v_fn = tl.load(v_ptrs)
        new_scale = tl.load(v_scale + start // SCALED)
        # A sum of its own, added in float32: the units' own sums keep about 14 bits.
        part_mf = tl.dot(p_mn.to(tl.float8e4nv), tl.trans(v_fn), out_dtype=tl.float32)
        acc_mf = tl.fma(acc_mf, (shrink_m * (value_scale / new_scale))[:, None], part_mf)
        value_scale = new_scale
    else:
        if TMA:
            v_nf = tl.reshape(v.load([batch, head, start, 0]), (BLOCK, BLOCK_F))
        else:
            v_ptrs = v + n[:, None].to(tl.int64) * stride_vn + f[None, :] * stride_vf
            if MASKED or WIDTH_V != BLOCK_F:
                v_nf = tl.load(v_ptrs, mask=there[:, None] & (f < WIDTH_V)[None, :], other=0.0)
            else:
                v_nf = tl.load(v_ptrs)
        acc_mf = tl.dot(p_mn.to(v_nf.dtype), v_nf, acc_mf * shrink_m[:, None], input_precision="ieee")
    return acc_mf, sum_m, new_m, value_scale


@triton.jit
def attend_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, y_ptr, out_scale_ptr, rotation_ptr,
    k_blocks, v_blocks, factor, heads, N, M,
    stride_qb, stride_qh, stride_qn, stride_qe, stride_sb, stride_sh, stride_sn,
    stride_kb, stride_kh, stride_kn, stride_tb, stride_th, stride_ts,
    stride_vb, stride_vh, stride_vn, stride_vf, stride_ub, stride_uh,
    WIDTH_Q: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
    Q_FORM: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, ROTATED: tl.constexpr,
    TOKEN_SCALES: tl.constexpr, FP8_VALUES: tl.constexpr, OUT_CODES: tl.constexpr,
    TMA: tl.constexpr, SCRATCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`BLOCK_M` queries of one head against all of its keys; y (B, N, H, F) contiguous.

    Args:
        k_ptr: codes (B, H, M, E), the last dimension contiguous.
        v_ptr: values (B, H, M, F); or e4m3 codes (B, H, F, M), the last dimension contiguous.
        k_blocks: with `TMA` a descriptor of the codes for blocks of (1, 1, BLOCK_N, BLOCK_E); what is less than
            `BLOCK_N` keys is loaded through the pointer always.
        v_blocks: with `TMA` one of the values likewise.
        factor: on the logits, log2(e) in it: exponentials are powers of 2.
        WHOLE: whether there are `BLOCK_N` keys at all.
        HALF: whether half a block of keys follows the whole ones.
        TAIL: width of the masked step that follows; 0: none.
        Q_FORM: ``codes`` (with their scales), or what is quantized here: ``token`` or, with one scale, ``given``.
        SCRATCH: see below.
    """
    tiles = tl.cdiv(N, BLOCK_M)
    tile, pair = tl.program_id(0) % tiles, tl.program_id(0) // tiles  # neighbours share a head's keys in the cache
    batch, head = pair // heads, pair % heads
    b, h = batch.to(tl.int64), head.to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    e, f = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    y_rows = ((b * N + m) * heads + head) * WIDTH_V
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + m[:, None].to(tl.int64) * stride_qn + e[None, :] * stride_qe
    q_me = tl.load(q_ptrs, mask=(m < N)[:, None] & (e < WIDTH_Q)[None, :], other=0.0)
    if Q_FORM == "codes":
        scale_m = tl.load(q_scale_ptr + b * stride_sb + h * stride_sh + m * stride_sn, mask=m < N, other=0.0)
    else:
        x_me = rotated(q_me, rotation_ptr, WIDTH_Q, ROTATED, BLOCK_E)
        if Q_FORM == "token":
            q_me, scale_m = quantize_rows(x_me, LARGEST, INTEGER)
        else:
            given = tl.load(q_scale_ptr)
            scale_m = given_scales(x_me, given, INTEGER)
            q_me = quantize_given(x_me, given, LARGEST, INTEGER)
        if SCRATCH:
            # Hopper's units can take the first operand from registers or from shared memory; Triton puts there only
            # what was loaded. From registers it costs 20 more of them, and a program less on each multiprocessor. So
            # the codes take a trip through this program's own rows of the output, which it writes last.
            code_ptrs = y_ptr.to(tl.pointer_type(q_me.dtype), bitcast=True) + e[None, :]
            code_ptrs += (y_rows * (y_ptr.dtype.element_ty.primitive_bitwidth // 8))[:, None]
            inside = (m < N)[:, None] & (e < WIDTH_K)[None, :]
            tl.store(code_ptrs, q_me, mask=inside)
            tl.debug_barrier()
            q_me = tl.load(code_ptrs, mask=inside, other=0.0)
    factor_m = scale_m * factor

    max_m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_m = tl.zeros((BLOCK_M,), tl.float32)
    acc_mf = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    value_scale = 1.0
    k_head, v_head = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    k_scale_head = k_scale_ptr + b * stride_tb + h * stride_th
    v_scale_head = v_scale_ptr + b * stride_ub + h * stride_uh
    whole = M // BLOCK_N * BLOCK_N
    if WHOLE:
        # Without this the way around the loop makes the assembler wait for each matrix instruction by itself (C7515).
        tl.assume(whole > 0)
        for start in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
            acc_mf, sum_m, max_m, value_scale = _step(
                acc_mf, sum_m, max_m, value_scale, q_me, factor_m,
                k_blocks if TMA else k_head, k_scale_head, v_blocks if TMA else v_head, v_scale_head,
                batch, head, start, M, stride_kn, stride_vn, stride_vf, stride_ts,
                WIDTH_K, WIDTH_V, BLOCK_E, BLOCK_F, BLOCK_N, False, TOKEN_SCALES, FP8_VALUES, TMA,
            )  # fmt: skip
    if HALF:
        acc_mf, sum_m, max_m, value_scale = _step(
            acc_mf, sum_m, max_m, value_scale, q_me, factor_m, k_head, k_scale_head, v_head, v_scale_head,
            batch, head, whole, M, stride_kn, stride_vn, stride_vf, stride_ts,
            WIDTH_K, WIDTH_V, BLOCK_E, BLOCK_F, BLOCK_N // 2, False, TOKEN_SCALES, FP8_VALUES, False,
        )  # fmt: skip
        whole += BLOCK_N // 2
    if TAIL > 0:
        acc_mf, sum_m, max_m, value_scale = _step(
            acc_mf, sum_m, max_m, value_scale, q_me, factor_m, k_head, k_scale_head, v_head, v_scale_head,
            batch, head, whole, M, stride_kn, stride_vn, stride_vf, stride_ts,
            WIDTH_K, WIDTH_V, BLOCK_E, BLOCK_F, TAIL, True, TOKEN_SCALES, FP8_VALUES, False,
        )  # fmt: skip

    y_mf = acc_mf * (value_scale / sum_m)[:, None]
    if OUT_CODES:
        if INTEGER:
            y_mf = tl.where(y_mf == y_mf, y_mf, 0.0)  # integers have no NaN: its code is 0
        y_mf = quantize_given(y_mf, tl.load(out_scale_ptr), LARGEST, INTEGER)
    if SCRATCH:
        tl.debug_barrier()  # no warp writes what another one has yet to read
    tl.store(
        y_ptr + y_rows[:, None] + f[None, :],
        y_mf.to(y_ptr.dtype.element_ty),
        mask=(m < N)[:, None] & (f < WIDTH_V)[None, :],
    )
