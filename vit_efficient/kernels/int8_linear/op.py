"""The integer linear layer as it runs: exact integer matmul, and the layer with its straight-through gradient.

Equal to `reference` bit for bit on the CPU, with fewer passes over memory. Shapes as there: M tokens, K inputs,
N outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear import reference
from vit_efficient.kernels.int8_linear.reference import LARGEST_CODE, SMALLEST_SCALE, WIDEST

# Elements that elementwise passes take at once on a CPU: 512 KiB of float32 stay in its second-level cache.
BLOCK = 2**17


def _blocks(tensor: Tensor) -> list[slice]:
    """Row ranges of a matrix that fit the cache of a CPU; the whole matrix elsewhere."""
    rows, columns = tensor.shape
    step = max(1, BLOCK // max(1, columns)) if tensor.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` of a matrix in fewer passes: two reductions in place of |x|, and no clamp.

    The clamp can be left out because the scale comes from the row itself: |x| / scale exceeds 127 by rounding only.
    Codes of rows that are not finite are unspecified; their scale is NaN.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the definition by itself
        return reference.quantize_rows(x_MK)
    x_MK = x_MK.to(torch.float32)
    amax_M1 = torch.maximum(x_MK.amax(dim=1, keepdim=True), -x_MK.amin(dim=1, keepdim=True))
    divisor_M1 = torch.full_like(amax_M1, LARGEST_CODE)  # a tensor, as in the definition
    scale_M1 = (amax_M1 / divisor_M1).clamp_min_(SMALLEST_SCALE).masked_fill_(amax_M1 == torch.inf, torch.nan)
    q_MK = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
    for rows in _blocks(x_MK):
        q_MK[rows].copy_((x_MK[rows] / scale_M1[rows]).round_())
    return q_MK, scale_M1


def dequantize_rows(q_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize_rows` of a matrix."""
    if torch.compiler.is_compiling():
        return reference.dequantize_rows(q_MK, scale_M1, dtype)
    x_MK = torch.empty(q_MK.shape, dtype=torch.float32, device=q_MK.device)
    for rows in _blocks(x_MK):
        x_MK[rows].copy_(q_MK[rows]).mul_(scale_M1[rows])
    return x_MK.to(dtype)


def epilogue(sum_MN: Tensor, scale_M1: Tensor, scale_N: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`reference.epilogue` in the memory of `sum_MN`, which is overwritten."""
    if torch.compiler.is_compiling():
        return reference.epilogue(sum_MN, scale_M1, scale_N, bias_N, dtype)
    y_MN = sum_MN.view(torch.float32)
    for rows in _blocks(y_MN):
        y_MN[rows].copy_(sum_MN[rows]).mul_(scale_M1[rows]).mul_(scale_N)
        if bias_N is not None:
            y_MN[rows].add_(bias_N)
    return y_MN.to(dtype)


@torch.library.custom_op("vit_efficient::int8_matmul", mutates_args=())
def int8_matmul(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    """``q_MK @ q_NK.T`` of int8 codes within +-127, exactly, as int32 (M, N).

    Raises:
        ValueError: K is so wide that int32 could overflow.
    """
    if q_MK.shape[1] > WIDEST:
        raise ValueError(f"int8_matmul: {q_MK.shape[1]:,} inputs can overflow int32; {WIDEST:,} is the most.")
    if q_MK.device.type == "cuda":
        return _cuda_matmul(q_MK, q_NK)
    if q_MK.device.type == "cpu" and cpu_int_mm_is_exact():
        return torch._int_mm(q_MK, q_NK.t())
    return reference.int8_matmul(q_MK, q_NK)


@int8_matmul.register_fake
def _(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    return q_MK.new_empty((q_MK.shape[0], q_NK.shape[0]), dtype=torch.int32)


@functools.cache
def cpu_int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` is exact on this processor; tried once, on the operands that strain it most.

    On x86 without VNNI instructions (before Ice Lake and Zen 4, roughly) oneDNN adds pairs of products in 16 bits,
    which saturate: the result is wrong, without a warning. There the exact float32 form is used instead.
    """
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


class _Int8Linear(torch.autograd.Function):
    """Forward on integers; backward as if the dequantized operands had been multiplied (straight-through).

    Keeps codes and scales for the backward, never a float copy: a quarter of what a float32 layer keeps.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:  # type: ignore[no-untyped-def]
        q_NK, scale_N1 = quantize_rows(weight_NK)
        q_MK, scale_M1 = quantize_rows(x.reshape(-1, x.shape[-1]))
        y_MN = epilogue(int8_matmul(q_MK, q_NK), scale_M1, scale_N1.squeeze(1), bias_N, dtype)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        for_x = (q_NK, scale_N1) if needs_x else (None, None)
        for_weight = (q_MK, scale_M1) if needs_weight else (None, None)
        ctx.save_for_backward(*for_x, *for_weight)
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_NK.dtype
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return y_MN.view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        q_NK, scale_N1, q_MK, scale_M1 = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = (grad_MN @ dequantize_rows(q_NK, scale_N1, grad.dtype)).view(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:
            grad_weight = (grad_MN.t() @ dequantize_rows(q_MK, scale_M1, grad.dtype)).to(ctx.weight_dtype)
        if needs_bias:
            grad_bias = grad_MN.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer returns for `x`: autocast's dtype where autocast is on, else the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def int8_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The layer in training: quantizes the float weight anew, multiplies integers, differentiable in all three.

    Integers, scales and epilogue do not depend on autocast, which decides the output's dtype only.

    Args:
        x: (..., K), floating point.
        weight_NK: (N, K), floating point.
        bias_N: (N,), floating point.

    Returns:
        (..., N), in autocast's dtype if autocast is on, else in that of `x`.
    """
    return _Int8Linear.apply(x, weight_NK, bias_N, output_dtype(x))


def int8_linear_codes(x: Tensor, q_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The layer as deployed: from the weight's codes and scales. Equal to `int8_linear` bit for bit; no gradient."""
    q_MK, scale_M1 = quantize_rows(x.reshape(-1, x.shape[-1]))
    y_MN = epilogue(int8_matmul(q_MK, q_NK), scale_M1, scale_N, bias_N, output_dtype(x))
    return y_MN.view(*x.shape[:-1], q_NK.shape[0])
