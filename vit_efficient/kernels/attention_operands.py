"""The kernel before attention (Triton): keys to codes, and values to what the chosen product with them wants.

One program: 128 tokens of one head, read once. Where a projection's kernel puts out codes already there is nothing to
do, and it does not run.

Legend: B batch, H heads, M tokens, E width of keys, F width of values, C blocks of 128 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vit_efficient.kernels.attention_kernel import rotated
from vit_efficient.kernels.device_functions import divide, encode, given_scales, quantize_given, quantize_rows

TOKENS = tl.constexpr(128)  # attention_values.BLOCK


@triton.jit
def _quantize_block(x_me, LARGEST: tl.constexpr, INTEGER: tl.constexpr, SMALLEST: tl.constexpr):
    """Codes of all of a tile under one scale, and that scale: NaN if anything in it is not finite."""
    amax = tl.max(tl.max(tl.where(x_me == x_me, tl.abs(x_me), float("inf")), 1), 0)
    scale = tl.maximum(tl.div_rn(amax, LARGEST * 1.0), SMALLEST)
    codes = encode(divide(x_me, scale, tl.div_rn(1.0, scale)), INTEGER)
    return codes, tl.where(amax == float("inf"), float("nan"), scale)


@triton.jit
def operands_kernel(
    k_ptr, k_scale_ptr, k_codes_ptr, k_scales_ptr, v_ptr, v_scale_ptr, v_out_ptr, v_scales_ptr, rotation_ptr,
    heads, M,
    stride_kb, stride_kh, stride_kn, stride_ke, stride_cb, stride_ch, stride_cn,
    stride_vb, stride_vh, stride_vn, stride_vf, stride_ub, stride_uh, stride_un,
    stride_ob, stride_oh, stride_on, stride_of,
    WIDTH_K: tl.constexpr, WIDTH_CODES: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
    K_FORM: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, ROTATED: tl.constexpr,
    SMALLEST: tl.constexpr, V_FORM: tl.constexpr,
):  # fmt: skip
    """128 tokens of one head.

    Args:
        k_scales_ptr: (B, H, M) for the form ``token``, else (B, H, C); contiguous.
        v_out_ptr: (B, H, M, F), or for the form ``fp8`` (B, H, F, M).
        v_scales_ptr: of the form ``fp8``, (B, H, C); contiguous.
        K_FORM: ``codes`` (nothing to do), ``token``, ``block``, or ``given``: the one scale at `k_scale_ptr`.
        V_FORM: ``as_is`` (nothing to do), ``token`` or ``given`` (to int8 and back), ``codes`` (int8, from the scales
            at `v_scale_ptr`), or ``fp8``.
    """
    pair, block = tl.program_id(0), tl.program_id(1)  # of the first there may be 2**31, of the second 65,535
    blocks = tl.num_programs(1)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    m = block * TOKENS + tl.arange(0, TOKENS)
    e, f = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    there = m < M
    rows = m[:, None].to(tl.int64)
    if K_FORM != "codes":
        k_ptrs = k_ptr + b * stride_kb + h * stride_kh + rows * stride_kn + e[None, :] * stride_ke
        k_me = tl.load(k_ptrs, mask=there[:, None] & (e < WIDTH_K)[None, :], other=0.0)
        x_me = rotated(k_me, rotation_ptr, WIDTH_K, ROTATED, BLOCK_E)
        if K_FORM == "token":
            codes, scale_m = quantize_rows(x_me, LARGEST, INTEGER)
            tl.store(k_scales_ptr + pair.to(tl.int64) * M + m, scale_m, mask=there)
        else:
            if K_FORM == "block":
                codes, scale = _quantize_block(x_me, LARGEST, INTEGER, SMALLEST)
            else:
                given = tl.load(k_scale_ptr)
                codes = quantize_given(x_me, given, LARGEST, INTEGER)
                scale = tl.sum(given_scales(x_me, given, INTEGER) - given, 0) + given  # NaN if one is
            tl.store(k_scales_ptr + pair.to(tl.int64) * blocks + block, scale)
        code_ptrs = k_codes_ptr + b * stride_cb + h * stride_ch + rows * stride_cn + e[None, :]
        tl.store(code_ptrs, codes, mask=there[:, None] & (e < WIDTH_CODES)[None, :])
    if V_FORM != "as_is":
        v_ptrs = v_ptr + b * stride_vb + h * stride_vh + rows * stride_vn + f[None, :] * stride_vf
        inside = there[:, None] & (f < WIDTH_V)[None, :]
        v_mf = tl.load(v_ptrs, mask=inside, other=0.0).to(tl.float32)
        out_ptrs = v_out_ptr + b * stride_ob + h * stride_oh + rows * stride_on + f[None, :] * stride_of
        if V_FORM == "fp8":
            codes, scale = _quantize_block(v_mf, 448, False, 2.0**-40)  # attention_values.SMALLEST_SCALE
            tl.store(v_scales_ptr + pair.to(tl.int64) * blocks + block, scale)
            tl.store(out_ptrs, codes, mask=inside)
        else:
            if V_FORM == "token":
                codes, scale_m = quantize_rows(v_mf, 127, True)
                y_mf = codes.to(tl.float32) * scale_m[:, None]
            elif V_FORM == "given":
                given = tl.load(v_scale_ptr)
                y_mf = quantize_given(v_mf, given, 127, True).to(tl.float32) * given_scales(v_mf, given, True)[:, None]
            else:
                scale_ptrs = v_scale_ptr + b * stride_ub + h * stride_uh + m * stride_un
                y_mf = v_mf * tl.load(scale_ptrs, mask=there, other=0.0)[:, None]
            tl.store(out_ptrs, y_mf.to(v_out_ptr.dtype.element_ty), mask=inside)
