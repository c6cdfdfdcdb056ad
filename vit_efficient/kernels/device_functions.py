"""Triton functions that kernels share: division, rounding and the making of codes, as the definitions have them.

Kernels are launched with `enable_fp_fusion=False`, so a product and a sum are rounded apart, as in plain PyTorch; where
a fused multiply-add is wanted, `tl.fma` asks for it.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # which knows no PTX

# 1.5 * 2**23: adding it to a float32 rounds that to an integer, ties to even, if its size is at most 2**22; the integer
# lies in the low bits of the sum. One addition, on every device and in the interpreter, where libdevice's rint is none.
ROUNDER = tl.constexpr(12582912.0)
# Smallest normal float32: `SMALLEST_SCALE` of the definitions.
SMALLEST_SCALE = tl.constexpr(2.0**-126)
MOST_FETCHED = tl.constexpr(2**20 - 16)  # bytes of one request: sm_90 counts its 16 bytes in 16 bits


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Before anything of memory: what the kernel before wrote is there then, and the kernel behind may start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(at, size, share, shares):
    """Ask for one of some equal shares of the `size` bytes behind a pointer to come into the L2 cache; both are
    multiples of 16.

    May come before the wait: nothing is read, and what the kernel before still writes goes through the same cache.
    Each warp asks once: all its threads name one address, and different ones would be served one after the other.
    Not for the interpreter.
    """
    WARPS: tl.constexpr = tl.extra.cuda.num_warps()
    warp = tl.arange(0, 32 * WARPS) // 32
    part = tl.minimum(tl.cdiv(size, shares * (WARPS * 16)) * 16, MOST_FETCHED)
    start = tl.minimum((share * WARPS + warp) * part, size - part)
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }", "=r,l,r",
        [(at + start).to(tl.uint64, bitcast=True), part + tl.zeros(start.shape, tl.int32)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def divide(x, divisor, reciprocal):
    """``x / divisor``, where `reciprocal` is ``div_rn(1, divisor)``: one product and two fused steps.

    The quotient's remainder is exact in a fused multiply-add, so the second step mends the first one's rounding
    (Markstein, IBM Journal of Research and Development 34 (1), 1990). A third of the instructions of `tl.div_rn`.
    """
    quotient = x * reciprocal
    remainder = tl.fma(-quotient, divisor, x)
    return tl.fma(remainder, reciprocal, quotient)


@triton.jit
def encode(steps, INTEGER: tl.constexpr):
    """``round(steps)`` as int8, ties to even, or as e4m3: of what is within the codes. NaNs get any code."""
    if INTEGER:
        codes = (steps + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        codes = steps.to(tl.float8e4nv)
    return codes


@triton.jit
def quantize_rows(y, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Codes and scales of the last dimension of y, float32, each row with its own scale.

    What lies outside the rows is zero. The scale is NaN where a row holds a NaN or an infinity. No clamp is needed:
    the largest magnitude over its scale exceeds `LARGEST` by rounding only.
    """
    axis: tl.constexpr = len(y.shape) - 1
    amax = tl.max(tl.where(y == y, tl.abs(y), float("inf")), axis)
    scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32)), SMALLEST_SCALE)
    reciprocal = tl.div_rn(tl.full(amax.shape, 1.0, tl.float32), scale)
    codes = encode(divide(y, tl.expand_dims(scale, axis), tl.expand_dims(reciprocal, axis)), INTEGER)
    return codes, tl.where(amax == float("inf"), float("nan"), scale)


@triton.jit
def quantize_given(y, scale, LARGEST: tl.constexpr, INTEGER: tl.constexpr, smooth=None, reciprocal=None):
    """Codes of y, or of ``y / smooth``, under one scale, a float32 scalar; `reciprocal` is ``1 / smooth``, rounded.

    Clamped once, before the first division, which infinities would not survive: what is cut off has the last code,
    and so has the limit, whose quotients round to within a few units in the last place of LARGEST.
    """
    limit = LARGEST * scale
    if smooth is not None:
        limit = limit * smooth
    y = tl.minimum(tl.maximum(y, -limit), limit)
    if smooth is not None:
        y = divide(y, smooth, reciprocal)
    return encode(divide(y, scale, tl.div_rn(1.0, scale)), INTEGER)


@triton.jit
def quantize_scaled(y, inverse, LARGEST: tl.constexpr, INTEGER: tl.constexpr):
    """Codes of ``y * inverse``, where `inverse` is a rounded ``1 / scale``: for what is not exact anyway (GELU).

    A product in place of a correctly rounded division: codes differ where a value lies within 1e-5 of a step of the
    middle between two.
    """
    steps = y * inverse
    return encode(tl.minimum(tl.maximum(steps, -LARGEST), LARGEST), INTEGER)


@triton.jit
def of_columns(vector, column, used, other):
    """A number a column, as a row that broadcasts."""
    return tl.load(vector + column, mask=used, other=other)[None, :]


@triton.jit
def given_scales(y, scale, INTEGER: tl.constexpr):
    """The scale of each row (last dimension) of y under a given one: NaN where the row is not a number.

    An infinity saturates among integers; e4m3 has none, and the row counts as spoilt.
    """
    axis: tl.constexpr = len(y.shape) - 1
    if INTEGER:
        bad = tl.where(y == y, 0.0, 1.0)
    else:
        bad = tl.where(tl.abs(y) < float("inf"), 0.0, 1.0)
    return tl.where(tl.max(bad, axis) > 0, float("nan"), scale)


@triton.jit
def quantize_block(
    y, scale, QUANT: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, smooth=None, reciprocal=None
):
    """Codes and scales of whole rows, or of ``y / smooth``: their own (`token`), or under the one that the pointer
    `scale` holds."""
    if QUANT == "token":
        if smooth is not None:
            y = divide(y, smooth, reciprocal)
        codes, scales = quantize_rows(y, LARGEST, INTEGER)
    else:
        given = tl.load(scale)
        codes = quantize_given(y, given, LARGEST, INTEGER, smooth, reciprocal)
        scales = given_scales(y, given, INTEGER)
    return codes, scales


@triton.jit
def _reciprocal(x):
    """``1 / x`` within 1 unit in the last place, for normal x."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def _exp2(x):
    """``2 ** x`` within 2 units in the last place; what would be subnormal is 0."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def gelu(y):
    """``0.5 * y * (1 + erf(y / sqrt(2)))``, within 9e-7 of it: PyTorch's own in float32 is within 1.2e-6.

    ``gelu(y) = max(y, 0) - |y| * exp(-y * y / 2) * M(|y|)``, where M, the normal distribution's tail over its density's
    exponential, is ``u * P(u)`` with ``u = 1 / (1 + 0.44 |y|)`` (Abramowitz and Stegun, 7.1.26, has this form) and P of
    degree 3, fitted for the least largest error of the whole. Few instructions, because the epilogue of a product takes
    as long as they do: no negation is one of its own, so P has its sign turned.
    """
    size = tl.abs(y)
    u = _reciprocal(tl.fma(size, 0.44, 1.0))
    tail = tl.fma(u, 0.12218806255643279, -0.33696019724467313)
    tail = tl.fma(u, tail, -0.09853260497599234)
    tail = tl.fma(u, tail, -0.18666867889786506)
    density = _exp2(y * y * -0.7213475204444817)  # log2(e) / 2
    return tl.fma(size * density, u * tail, tl.maximum(y, 0.0))


@triton.jit
def gelu_slope(y):
    """The derivative of `gelu`'s erf form, within 4e-5: the normal distribution below y, and y times its density.

    The distribution beyond |y| is ``u * P(u) * exp(-y * y / 2)``, of `gelu`'s u and P.
    """
    u = _reciprocal(tl.fma(tl.abs(y), 0.44, 1.0))
    beyond = tl.fma(u, -0.12218806255643279, 0.33696019724467313)
    beyond = tl.fma(u, beyond, 0.09853260497599234)
    beyond = tl.fma(u, beyond, 0.18666867889786506)
    density = _exp2(y * y * -0.7213475204444817)
    beyond = beyond * u * density
    return tl.fma(y * density, 0.3989422804014327, tl.where(y < 0, beyond, 1.0 - beyond))
