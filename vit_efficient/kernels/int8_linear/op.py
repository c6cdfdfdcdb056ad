"""The integer linear layer as it runs, with its straight-through gradient.

Equal to `reference` bit for bit on the CPU, with fewer passes over memory. Shapes as there: M tokens, K inputs,
N outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear import reference
from vit_efficient.kernels.int8_linear.passes import (
    dequantize_rows,
    dequantize_weight,
    epilogue,
    quantize_activations,
    quantize_clipping,
    quantize_weight,
)
from vit_efficient.kernels.int8_linear.passes import quantize_given as quantize_given
from vit_efficient.kernels.int8_linear.passes import quantize_rows as quantize_rows
from vit_efficient.kernels.int8_linear.product import cpu_int_mm_is_exact as cpu_int_mm_is_exact
from vit_efficient.kernels.int8_linear.product import int8_matmul
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.kernels.linear.op import linear_of_codes


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
        needs_x, needs_weight, _, needs_input_scale, needs_weight_scale, *_ = ctx.needs_input_grad
        clipped_x = x_MK if needs_input_scale else None
        if scheme.activations == "static" and needs_x and not needs_input_scale:
            assert input_scale is not None
            q_MK, scale_M1, clipped_x = quantize_clipping(x_MK, input_scale, scheme.largest_activation)
        else:
            q_MK, scale_M1 = quantize_activations(x_MK, scheme, input_scale)
        y_MN = multiply(q_MK, scale_M1, q_NK, scale_NG, bias_N, scheme, dtype)
        for_x = (q_NK, scale_NG) if needs_x or needs_input_scale else (None, None)
        for_weight = (q_MK, scale_M1) if needs_weight or needs_weight_scale else (None, None)
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
                largest = _number(scheme.largest_activation, grad.device)
                grad_MK, grad_input_scale = _given_range(grad_MK, x_or_clipped, input_scale, -largest, largest)
                grad_input_scale = grad_input_scale.sum().view(input_scale.shape)
            elif x_or_clipped is not None:
                grad_MK = grad_MK.masked_fill_(x_or_clipped, 0)  # made just now
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


def _number(value: int, device: torch.device) -> Tensor:
    """Made on the device: a copy of one made here would wait for all that a GPU has still to do."""
    return torch.full((), float(value), device=device)


def _spread(scale_NG: Tensor, inputs: int, scheme: Scheme) -> Tensor:
    """Scales of a weight, one for every element of it or broadcasting to that."""
    return scale_NG if scheme.group is None else scale_NG.repeat_interleave(scheme.group, dim=1)[:, :inputs]


def _bounds(zero_NG: Tensor | None, weight_NK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The least and the largest code of each weight."""
    if zero_NG is None:
        largest = _number(scheme.largest_weight, weight_NK.device)
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
