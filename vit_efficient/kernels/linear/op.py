"""A linear layer on codes, with what follows it in the same pass over the outputs, as operators.

`reference` is the definition and says what each form computes, in which order. On a GPU from sm_80 (fp8: sm_89) one
Triton kernel does it, elsewhere plain PyTorch. int8 results equal the definition's bit for bit, except behind GELU,
whose erf is a library's; fp8 sums are compared within rounding. No gradients.

Shapes: M rows (all leading dimensions flattened; tokens), K inputs, N outputs, B batch, T tokens an image, H heads, E
head width, P parts (3 of a fused qkv or 2 of it, 1 of a split one).

Arguments that all share:
    q: codes of tokens (..., K), int8 or float8_e4m3fn.
    scale: theirs, (..., 1) float32, or one in all.
    weight: codes (N, K) of the same dtype.
    weight_scale: (N, 1), or (1, 1), float32.
    bias: (N,), floating point, or None.
    accumulation: of fp8 sums: `full`, in float32 at least every 128 products, or `fast`, in the fewer bits of the
        matrix units throughout, where they have such a mode (sm_89, sm_90). Integer sums are exact.

All raise ValueError for shapes that do not fit each other.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from vit_efficient.kernels.device import check_form, require_fp8, runs_triton
from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.int8_linear.reference import WIDEST
from vit_efficient.kernels.linear import reference
from vit_efficient.kernels.quantize.op import reciprocal_of

Accumulation = Literal["full", "fast"]


def _on_gpu(q_MK: Tensor, q_NK: Tensor) -> bool:
    """Whether the kernel runs, which takes no sums of nothing; checks that these codes can be multiplied at all."""
    if q_MK.dtype != q_NK.dtype:
        raise ValueError(f"linear: codes of tokens are {q_MK.dtype}, those of the weight {q_NK.dtype}; they must agree")
    if q_MK.dtype == torch.int8:
        if q_MK.shape[1] > WIDEST:
            raise ValueError(f"linear: {q_MK.shape[1]:,} inputs can overflow int32; {WIDEST:,} is the most.")
    else:
        require_fp8(q_MK)
    return runs_triton(q_MK) and q_MK.numel() > 0 and q_NK.numel() > 0


@torch.library.custom_op("vit_efficient::linear", mutates_args=())
def linear_of_codes(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """`linear` on matrices: (M, N) in `dtype`."""
    if _on_gpu(q_MK, q_NK):
        from vit_efficient.kernels.linear import launch

        return launch.linear(q_MK, scale_M1, q_NK, scale_N1, bias_N, gelu, dtype, fast)
    y_MN = reference.product(q_MK, scale_M1, q_NK, scale_N1, bias_N)
    return (reference.gelu(y_MN) if gelu else y_MN).to(dtype)


@linear_of_codes.register_fake
def _(q_MK, scale_M1, q_NK, scale_N1, bias_N, gelu, dtype, fast):  # type: ignore[no-untyped-def]
    return q_MK.new_empty((q_MK.shape[0], q_NK.shape[0]), dtype=dtype)


@torch.library.custom_op("vit_efficient::linear_quant", mutates_args=())
def _linear_quant(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    out_scale: Tensor,
    shift_N: Tensor | None,
    smooth_N: Tensor | None,
    reciprocal_N: Tensor | None,
    form: str,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    check_form(form, q_MK)
    if _on_gpu(q_MK, q_NK):
        from vit_efficient.kernels.linear import launch

        operands = (q_MK, scale_M1, q_NK, scale_N1, bias_N)
        return launch.linear_quant(*operands, gelu, out_scale, form, fast, shift_N, smooth_N, reciprocal_N)
    y_MN = reference.product(q_MK, scale_M1, q_NK, scale_N1, bias_N)
    y_MN = reference.gelu(y_MN) if gelu else y_MN
    return reference.requantized(y_MN, scale_M1, out_scale, form, shift_N, smooth_N)


@_linear_quant.register_fake
def _(q_MK, scale_M1, q_NK, scale_N1, bias_N, gelu, out_scale, shift_N, smooth_N, reciprocal_N, form, fast):  # type: ignore[no-untyped-def]
    codes = q_MK.new_empty((q_MK.shape[0], q_NK.shape[0]), dtype=format_of(form).dtype)
    return codes, q_MK.new_empty((q_MK.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("vit_efficient::linear_residual", mutates_args=())
def _linear_residual(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    residual_MN: Tensor,
    gamma_N: Tensor | None,
    fast: bool,
) -> Tensor:
    if _on_gpu(q_MK, q_NK):
        from vit_efficient.kernels.linear import launch

        return launch.linear_residual(q_MK, scale_M1, q_NK, scale_N1, bias_N, residual_MN, gamma_N, fast)
    y_MN = reference.product(q_MK, scale_M1, q_NK, scale_N1, bias_N)
    return reference.with_residual(y_MN, residual_MN, gamma_N).contiguous()


@_linear_residual.register_fake
def _(q_MK, scale_M1, q_NK, scale_N1, bias_N, residual_MN, gamma_N, fast):  # type: ignore[no-untyped-def]
    return residual_MN.new_empty(residual_MN.shape)


@torch.library.custom_op("vit_efficient::linear_heads", mutates_args=())
def _linear_heads(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    tokens: int,
    heads: int,
    parts: int,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    if _on_gpu(q_MK, q_NK):
        from vit_efficient.kernels.linear import launch

        return launch.linear_heads(q_MK, scale_M1, q_NK, scale_N1, bias_N, tokens, heads, parts, dtype, fast)
    y_MN = reference.product(q_MK, scale_M1, q_NK, scale_N1, bias_N)
    return reference.heads_first(y_MN, tokens, heads, parts).to(dtype)


@_linear_heads.register_fake
def _(q_MK, scale_M1, q_NK, scale_N1, bias_N, tokens, heads, parts, dtype, fast):  # type: ignore[no-untyped-def]
    return q_MK.new_empty(_heads_shape(q_MK, q_NK, tokens, heads, parts), dtype=dtype)


@torch.library.custom_op("vit_efficient::linear_heads_quant", mutates_args=())
def _linear_heads_quant(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    tokens: int,
    heads: int,
    parts: int,
    form: str,
    scale_P: Tensor | None,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    check_form(form, q_MK)
    if _on_gpu(q_MK, q_NK):
        from vit_efficient.kernels.linear import launch

        return launch.linear_heads_quant(
            q_MK, scale_M1, q_NK, scale_N1, bias_N, tokens, heads, parts, form, scale_P, fast
        )
    y_MN = reference.product(q_MK, scale_M1, q_NK, scale_N1, bias_N)
    codes, scales = reference.quantized_heads(reference.heads_first(y_MN, tokens, heads, parts), form, scale_P)
    return codes, scales.contiguous()


@_linear_heads_quant.register_fake
def _(q_MK, scale_M1, q_NK, scale_N1, bias_N, tokens, heads, parts, form, scale_P, fast):  # type: ignore[no-untyped-def]
    shape = _heads_shape(q_MK, q_NK, tokens, heads, parts)
    codes = q_MK.new_empty(shape, dtype=format_of(form).dtype)
    return codes, q_MK.new_empty((*shape[:-1], 1), dtype=torch.float32)


def _heads_shape(q_MK: Tensor, q_NK: Tensor, tokens: int, heads: int, parts: int) -> tuple[int, ...]:
    return parts, q_MK.shape[0] // tokens, heads, tokens, q_NK.shape[0] // (parts * heads)


Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def _operands(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Operands:
    """As matrices: codes (M, K), scales (M, 1) or (1, 1), the weight (N, K), its scales (N, 1) or (1, 1), and bias.

    Raises:
        ValueError: shapes that do not fit each other; kernels would read and write beyond them.
    """
    rows, outputs = math.prod(q.shape[:-1]), weight.shape[0]
    if q.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: codes are {tuple(q.shape)} and the weight is {tuple(weight.shape)}; inputs differ")
    for what, given, wanted in (("codes", scale, rows), ("the weight", weight_scale, outputs)):
        # A product, since a compiler that does not know the number of rows cannot compare it with 1.
        if (given.numel() - 1) * (given.numel() - wanted) != 0:
            raise ValueError(f"linear: scales of {what} are {tuple(given.shape)}; wanted are 1 or {wanted}")
    _check_columns("bias", bias, outputs)
    # Of the codes, -1 would be ambiguous without inputs.
    return q.reshape(rows, q.shape[-1]), scale.reshape(-1, 1), weight, weight_scale.reshape(-1, 1), bias


def _check_columns(what: str, given: Tensor | None, outputs: int) -> None:
    if given is not None and given.numel() != outputs:
        raise ValueError(f"linear: {what} is {tuple(given.shape)}, and the layer has {outputs} outputs")


def _check_heads(q: Tensor, weight: Tensor, heads: int, parts: int, scales: Tensor | None = None) -> None:
    """Refuse outputs that are no whole heads, of which a kernel would write the rest behind its memory."""
    if q.ndim < 2 or q.shape[-2] == 0:
        raise ValueError(f"linear: codes are {tuple(q.shape)}; heads are laid out of (..., T, K), T at least 1")
    if heads < 1 or parts < 1 or weight.shape[0] % (parts * heads) != 0:
        raise ValueError(f"linear: {weight.shape[0]} outputs are not {parts} parts of {heads} heads of one width")
    if scales is not None and scales.numel() != parts:
        raise ValueError(f"linear: scales of parts are {tuple(scales.shape)}; there are {parts} parts")


def linear(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    gelu: bool = False,
    accumulation: Accumulation = "full",
) -> Tensor:
    """The layer, with or without GELU: (..., N) in `dtype`."""
    operands = _operands(q, scale, weight, weight_scale, bias)
    y_MN = linear_of_codes(*operands, gelu, dtype, accumulation == "fast")
    return y_MN.view(*q.shape[:-1], weight.shape[0])


def linear_quant(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    *,
    shift_N: Tensor | None = None,
    smooth_N: Tensor | None = None,
    reciprocal_N: Tensor | None = None,
    form: str = "int8",
    gelu: bool = False,
    accumulation: Accumulation = "full",
) -> tuple[Tensor, Tensor]:
    """The layer, with or without GELU, quantized with a given scale for the next one.

    Args:
        out_scale: one positive float32 on the device.
        shift_N: (N,) float32, subtracted from the output before it is quantized; or None.
        smooth_N: (N,) positive float32, by which the output is divided after that; or None.
        reciprocal_N: ``1 / smooth_N``, if it is at hand; else it is made here. Results do not depend on it.
        form: of the codes: `int8`, `int4` or `fp8`.

    Returns:
        codes (..., N) and scales (..., 1) float32, all `out_scale` except where a row came in with the scale NaN.
    """
    operands = _operands(q, scale, weight, weight_scale, bias)
    for what, given in (("shift", shift_N), ("smoothing", smooth_N), ("its reciprocal", reciprocal_N)):
        _check_columns(what, given, weight.shape[0])
    if out_scale.numel() != 1:
        raise ValueError(f"linear: the scale of the output is {tuple(out_scale.shape)}; wanted is one number")
    vectors = shift_N, smooth_N, reciprocal_of(smooth_N, reciprocal_N)
    codes, scales = _linear_quant(*operands, gelu, out_scale, *vectors, form, accumulation == "fast")
    return codes.view(*q.shape[:-1], weight.shape[0]), scales.view(*q.shape[:-1], 1)


def linear_residual(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
    *,
    accumulation: Accumulation = "full",
) -> Tensor:
    """``residual + gamma * layer``, (..., N) in the residual's dtype; `gamma` (N,) is the layer scale, or None."""
    operands = _operands(q, scale, weight, weight_scale, bias)
    rows, outputs = operands[0].shape[0], weight.shape[0]
    if residual.shape[-1] != outputs or math.prod(residual.shape[:-1]) != rows:
        raise ValueError(f"linear: the residual is {tuple(residual.shape)}; the layer puts out {(rows, outputs)}")
    _check_columns("the layer scale", gamma, outputs)
    flat_MN = residual.reshape(-1, residual.shape[-1])
    return _linear_residual(*operands, flat_MN, gamma, accumulation == "fast").view(residual.shape)


def linear_heads(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    heads: int,
    *,
    dtype: torch.dtype,
    parts: int = 3,
    accumulation: Accumulation = "full",
) -> Tensor:
    """Queries, keys and values as attention reads them: q (B, T, K) gives (P, B, H, T, E), contiguous, in `dtype`."""
    operands = _operands(q, scale, weight, weight_scale, bias)
    _check_heads(q, weight, heads, parts)
    return _linear_heads(*operands, q.shape[-2], heads, parts, dtype, accumulation == "fast")


def linear_heads_quant(
    q: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    heads: int,
    *,
    form: str = "int8",
    parts: int = 3,
    scales: Tensor | None = None,
    accumulation: Accumulation = "full",
) -> tuple[Tensor, Tensor]:
    """The same, quantized as `int8_attention` takes its operands.

    Args:
        form: of the codes.
        scales: (P,) positive float32, one for each part (static); None: each token's and head's own.

    Returns:
        codes (P, B, H, T, E) and scales (P, B, H, T, 1) float32.
    """
    operands = _operands(q, scale, weight, weight_scale, bias)
    _check_heads(q, weight, heads, parts, scales)
    return _linear_heads_quant(*operands, q.shape[-2], heads, parts, form, scales, accumulation == "fast")
