"""Triton functions that kernels share: division, rounding and the making of codes, as the definitions have them.

Kernels are launched with `enable_fp_fusion=False`, so a product and a sum are rounded apart, as in plain PyTorch; where
a fused multiply-add is wanted, `tl.fma` asks for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2**23: adding it to a float32 rounds that to an integer, ties to even, if its size is at most 2**22; the integer
# lies in the low bits of the sum. One addition, on every device and in the interpreter, where libdevice's rint is none.
ROUNDER = tl.constexpr(12582912.0)
# Smallest normal float32: `SMALLEST_SCALE` of the definitions.
SMALLEST_SCALE = tl.constexpr(2.0**-126)


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
def gelu(y):
    """``0.5 * y * (1 + erf(y / sqrt(2)))``, within 5e-7 of it for |y| <= 12: PyTorch's own in float32 is within 1.2e-6.

    ``gelu(y) = max(y, 0) - |y| * exp(-y * y / 2) * M(|y|)``, where M, the normal distribution's tail over its density's
    exponential, is smooth: a polynomial of degree 9, fitted for the least largest error of the whole on 0 .. 8. A third
    of the instructions of `tl.erf`, which in the epilogue of a product take as long as the product itself.
    """
    size = tl.minimum(tl.abs(y), 8.0)
    tail = tl.fma(size, -4.501790044741938e-06, 9.55557479755953e-05)
    tail = tl.fma(size, tail, -0.0009018401033245027)
    tail = tl.fma(size, tail, 0.005081660114228725)
    tail = tl.fma(size, tail, -0.01954605244100094)
    tail = tl.fma(size, tail, 0.056184783577919006)
    tail = tl.fma(size, tail, -0.12938277423381805)
    tail = tl.fma(size, tail, 0.24880942702293396)
    tail = tl.fma(size, tail, -0.39874693751335144)
    tail = tl.fma(size, tail, 0.49998894333839417)
    root = y * 0.8493218003  # sqrt(log2(e) / 2): exp(-y * y / 2) = exp2(-root * root)
    return tl.fma(-(size * tl.exp2(-(root * root))), tail, tl.maximum(y, 0.0))
