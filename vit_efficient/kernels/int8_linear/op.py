"""The integer linear layer as it runs, with its straight-through gradient.

Equal to `reference` bit for bit on the CPU, with fewer passes over memory. Shapes as there: M tokens, K inputs,
N outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear import reference
from vit_efficient.kernels.int8_linear.product import cpu_int_mm_is_exact as cpu_int_mm_is_exact
from vit_efficient.kernels.int8_linear.product import int8_matmul
from vit_efficient.kernels.int8_linear.reference import LARGEST_CODE, SMALLEST_SCALE
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.kernels.linear.op import linear_of_codes

# Elements that elementwise passes take at once on a CPU: 512 KiB of float32 stay in its second-level cache.
BLOCK = 2**17


def _blocks(tensor: Tensor) -> list[slice]:
    """Row ranges of a matrix that fit the cache of a CPU; the whole matrix elsewhere."""
    rows, columns = tensor.shape
    step = max(1, BLOCK // max(1, columns)) if tensor.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]


def quantize_rows(x_MK: Tensor, largest: int = LARGEST_CODE) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` of a matrix in fewer passes: two reductions in place of |x|, and no clamp.

    The clamp can be left out because the scale comes from the row itself: |x| / scale exceeds it by rounding only.
    Codes of rows that are not finite are unspecified; their scale is NaN.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the definition by itself
        return reference.quantize_rows(x_MK, largest)
    x_MK = x_MK.to(torch.float32)
    amax_M1 = torch.maximum(x_MK.amax(dim=1, keepdim=True), -x_MK.amin(dim=1, keepdim=True))
    divisor_M1 = torch.full_like(amax_M1, largest)  # a tensor, as in the definition
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


def quantize_given(x_MK: Tensor, scale: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """`reference.quantize_given` of a matrix with one scale in all. Codes of rows that hold a NaN are unspecified."""
    if torch.compiler.is_compiling():
        codes, scale_M1 = reference.quantize_given(x_MK, scale.reshape(1, 1), largest)
        return codes, scale_M1.expand(x_MK.shape[0], 1)
    q_MK = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
    for rows in _blocks(x_MK):
        q_MK[rows].copy_((x_MK[rows].to(torch.float32) / scale).round_().clamp_(-largest, largest))
    bad_M1 = x_MK.amax(dim=1, keepdim=True).isnan()  # the maximum passes a NaN on
    return q_MK, torch.where(bad_M1, torch.nan, scale.reshape(1, 1))


def quantize_activations(x_MK: Tensor, scheme: Scheme, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations`."""
    if scheme.activations == "token":
        return quantize_rows(x_MK, scheme.largest_activation)
    if scheme.activations == "static" and x_MK.numel():
        assert scale is not None, "static activations have a scale"
        return quantize_given(x_MK, scale, scheme.largest_activation)
    if not x_MK.numel() and scheme.activations != "none":
        return x_MK.to(torch.int8), x_MK.new_ones((x_MK.shape[0], 1), dtype=torch.float32)
    return reference.quantize_activations(x_MK, scheme, scale)


def quantize_weight(
    weight_NK: Tensor, scheme: Scheme, scale: Tensor | None = None, zero: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.quantize_weight`."""
    if scale is None and scheme.weights == "channel" and scheme.group is None and not scheme.zero_point:
        return quantize_rows(weight_NK, scheme.largest_weight)
    return reference.quantize_weight(weight_NK, scheme, scale, zero)


def dequantize_weight(q_NK: Tensor, scale_NG: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize_weight`."""
    if scheme.group is None and scheme.weights == "channel":
        return dequantize_rows(q_NK, scale_NG, dtype)
    return reference.dequantize_weight(q_NK, scale_NG, scheme, dtype)


def multiply(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype,
) -> Tensor:
    """The product of two quantized operands with its epilogue: (M, N) in `dtype`; on a GPU in one kernel."""
    if scheme.group is None and q_MK.device.type == "cuda":
        return linear_of_codes(q_MK, scale_M1, q_NK, scale_NG.reshape(-1, 1), bias_N, False, dtype, False)
    if scheme.group is None:
        return epilogue(int8_matmul(q_MK, q_NK), scale_M1, scale_NG.reshape(-1), bias_N, dtype)
    y_MN = torch.zeros(q_MK.shape[0], q_NK.shape[0], device=q_MK.device)
    parts = zip(q_MK.split(scheme.group, 1), q_NK.split(scheme.group, 1), scale_NG.unbind(1), strict=True)
    for a_MK, b_NK, scale_N in parts:
        y_MN += int8_matmul(a_MK.contiguous(), b_NK.contiguous()).to(torch.float32) * scale_N
    return reference.epilogue(y_MN, scale_M1, torch.ones_like(scale_NG[:, 0]), bias_N, dtype)


class _Int8Linear(torch.autograd.Function):
    """Forward on integers; backward as if the dequantized operands had been multiplied (straight-through).

    A value beyond a given range has no gradient; a scale that is learned has that of learned step sizes (LSQ, Esser et
    al., arXiv:1902.08153, equations 3 to 5). Scales that follow the largest magnitude clip nothing and have none.
    Keeps codes and scales for the backward, never a float copy (a quarter of what a float32 layer keeps), except for
    an activation whose scale is learned.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        input_scale: Tensor | None,
        weight_scale: Tensor | None,
        weight_zero: Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype,
    ) -> Tensor:
        q_NK, scale_NG = quantize_weight(weight_NK, scheme, weight_scale, weight_zero)
        x_MK = x.reshape(-1, x.shape[-1])
        q_MK, scale_M1 = quantize_activations(x_MK, scheme, input_scale)
        y_MN = multiply(q_MK, scale_M1, q_NK, scale_NG, bias_N, scheme, dtype)
        needs_x, needs_weight, _, needs_input_scale, needs_weight_scale, *_ = ctx.needs_input_grad
        for_x = (q_NK, scale_NG) if needs_x or needs_input_scale else (None, None)
        for_weight = (q_MK, scale_M1) if needs_weight or needs_weight_scale else (None, None)
        static = scheme.activations == "static"
        clipped_x = None
        if needs_input_scale:
            clipped_x = x_MK
        elif static and needs_x:
            assert input_scale is not None
            clipped_x = (x_MK.abs() / input_scale).round() > scheme.largest_activation
        ctx.save_for_backward(
            *for_x,
            *for_weight,
            clipped_x,
            input_scale,
            *((weight_NK, weight_scale, weight_zero) if weight_scale is not None else (None, None, None)),
        )
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_NK.dtype
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        ctx.scheme = scheme
        return y_MN.view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        q_NK, scale_NG, q_MK, scale_M1, x_or_clipped, input_scale, *given = ctx.saved_tensors
        weight_NK, weight_scale, weight_zero = given
        needs_x, needs_weight, needs_bias, needs_input_scale, needs_weight_scale, *_ = ctx.needs_input_grad
        scheme: Scheme = ctx.scheme
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = grad_input_scale = grad_weight_scale = None
        if needs_x or needs_input_scale:
            grad_MK = grad_MN @ dequantize_weight(q_NK, scale_NG, scheme, grad.dtype)
            if needs_input_scale:
                largest = torch.tensor(float(scheme.largest_activation), device=grad.device)
                grad_MK, grad_input_scale = _given_range(grad_MK, x_or_clipped, input_scale, -largest, largest)
                grad_input_scale = grad_input_scale.sum().view(input_scale.shape)
            elif x_or_clipped is not None:
                grad_MK = grad_MK.masked_fill(x_or_clipped, 0)
            grad_x = grad_MK.view(ctx.x_shape).to(ctx.x_dtype) if needs_x else None
        if needs_weight or needs_weight_scale:
            grad_NK = grad_MN.t() @ dequantize_rows(q_MK, scale_M1, grad.dtype)
            if weight_scale is not None:
                scale_NK = _spread(weight_scale, weight_NK.shape[1], scheme)
                low, high = _bounds(weight_zero, weight_NK, scheme)
                grad_NK, towards_scale = _given_range(grad_NK, weight_NK, scale_NK, low, high)
                if needs_weight_scale:
                    grad_weight_scale = _gather(towards_scale, weight_scale, scheme)
            grad_weight = grad_NK.to(ctx.weight_dtype) if needs_weight else None
        if needs_bias:
            grad_bias = grad_MN.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_input_scale, grad_weight_scale, None, None, None


def _given_range(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and, not yet summed, to its scale, from that of the dequantized x."""
    steps = x.to(torch.float32) / scale
    codes = steps.round()
    # What is rounded to the last code is not clipped, as the forward rounds before it clamps. Calibrated weights lie on
    # their codes, within rounding: compared unrounded, chance would decide which of the last ones have a gradient.
    inside = (codes >= low) & (codes <= high)
    # d(scale * code) / d(scale): the rounding error within the range, the last code beyond it.
    slope = torch.where(inside, codes - steps, codes.clamp(low, high))
    return grad * inside, grad.to(torch.float32) * slope


def _spread(scale_NG: Tensor, inputs: int, scheme: Scheme) -> Tensor:
    """Scales of a weight, one for every element of it or broadcasting to that."""
    return scale_NG if scheme.group is None else scale_NG.repeat_interleave(scheme.group, dim=1)[:, :inputs]


def _bounds(zero_NG: Tensor | None, weight_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The least and the largest code of each weight."""
    if zero_NG is None:
        largest = torch.tensor(float(scheme.largest_weight), device=weight_NK.device)
        return -largest, largest
    zero_NK = _spread(zero_NG, weight_NK.shape[1], scheme)
    return -zero_NK, 15 - zero_NK


def _gather(towards_NK: Tensor, scale_NG: Tensor, scheme: Scheme) -> Tensor:
    """Sum what belongs to each scale of a weight."""
    if scheme.weights == "tensor":
        return towards_NK.sum().view(scale_NG.shape)
    if scheme.group is None:
        return towards_NK.sum(dim=1, keepdim=True)
    groups = scale_NG.shape[1]
    padded = F.pad(towards_NK, (0, groups * scheme.group - towards_NK.shape[1]))
    return padded.view(towards_NK.shape[0], groups, scheme.group).sum(dim=2)


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer returns for `x`: autocast's dtype where autocast is on, else the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


DEFAULT = Scheme()


def int8_linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    scheme: Scheme = DEFAULT,
    input_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    weight_zero: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The layer in training: quantizes the float weight anew, multiplies integers, differentiable in all its tensors.

    Integers, scales and epilogue do not depend on autocast, which decides the output's dtype only.

    Args:
        x: (..., K), floating point.
        weight_NK: (N, K), floating point.
        bias_N: (N,), floating point.
        scheme: how both are quantized.
        input_scale: of static activations, one positive float32.
        weight_scale: given scales, (N, G) or (1, 1) float32; None: they follow the weight.
        weight_zero: given zero points, (N, G), beside given scales of a scheme that has them.
        dtype: of the output; None: autocast's if autocast is on, else that of `x`.

    Returns:
        (..., N).
    """
    dtype = output_dtype(x) if dtype is None else dtype
    return _Int8Linear.apply(x, weight_NK, bias_N, input_scale, weight_scale, weight_zero, scheme, dtype)


def int8_linear_codes(
    x: Tensor,
    q_NK: Tensor,
    scale_NG: Tensor,
    bias_N: Tensor | None = None,
    scheme: Scheme = DEFAULT,
    input_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The layer as deployed: from the weight's codes and scales. Equal to `int8_linear` bit for bit; no gradient."""
    q_MK, scale_M1 = quantize_activations(x.reshape(-1, x.shape[-1]), scheme, input_scale)
    dtype = output_dtype(x) if dtype is None else dtype
    return multiply(q_MK, scale_M1, q_NK, scale_NG, bias_N, scheme, dtype).view(*x.shape[:-1], q_NK.shape[0])
