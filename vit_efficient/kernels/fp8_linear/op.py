"""The fp8 linear layer as it runs: the product on fp8 matrix units, and the layer with its straight-through gradient.

On a GPU from sm_89 `torch._scaled_mm` multiplies; elsewhere the reference does. On a CPU the two are equal bit for
bit. Shapes as in `reference`: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.fp8_linear import reference
from vit_efficient.kernels.fp8_linear.passes import dequantize, quantize_activations, quantize_weight
from vit_efficient.kernels.fp8_linear.reference import FORMAT, LARGEST, Scheme

FIRST_CAPABLE = (8, 9)  # compute capability with fp8 matrix units
MULTIPLE = 16  # `torch._scaled_mm` wants K and N in these


@functools.cache
def has_units(device: int) -> bool:
    """Whether a CUDA device, by its index, multiplies fp8 matrices."""
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABLE


@torch.library.custom_op("vit_efficient::fp8_matmul", mutates_args=())
def fp8_matmul(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """``((q_MK @ q_NK.T) * scale_M1) * scale_N1.T + bias`` of e4m3 codes, as `dtype` (M, N).

    On fp8 units with a bfloat16 result, scales and bias are applied inside the product: the order of the two scales is
    the library's, and the bias is rounded to bfloat16 first. With another result the order is the written one.

    Args:
        q_MK: tokens, float8_e4m3fn.
        scale_M1: theirs, float32; or one, (1, 1).
        q_NK: weight, float8_e4m3fn.
        scale_N1: its own, float32; or one, (1, 1).
        bias_N: floating point, or None.
        dtype: of the result.
        fast: sum in the fewer bits of the matrix units, where they have such a mode.
    """
    device = q_MK.device
    if device.type == "cuda" and q_MK.shape[0] and has_units(device.index):
        return _on_units(q_MK, scale_M1, q_NK, scale_N1, bias_N, dtype, fast)
    return reference.epilogue(reference.product(q_MK, q_NK), scale_M1, scale_N1, bias_N, dtype)


@fp8_matmul.register_fake
def _(q_MK, scale_M1, q_NK, scale_N1, bias_N, dtype, fast):  # type: ignore[no-untyped-def]
    return q_MK.new_empty((q_MK.shape[0], q_NK.shape[0]), dtype=dtype)


def _on_units(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """The product by `torch._scaled_mm`; padding of zeros adds nothing to a sum, and is cut off."""
    rows, outputs = q_MK.shape[0], q_NK.shape[0]
    inner, outer = -q_MK.shape[1] % MULTIPLE, -outputs % MULTIPLE
    q_MK, q_NK = padded(q_MK, inner, 0), padded(q_NK, inner, outer)
    if dtype != torch.bfloat16:  # scales a row exist for bfloat16 results only, and float32 results take no bias
        one = scale_M1.new_ones(())
        sum_MN = torch._scaled_mm(q_MK, q_NK.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast)
        return reference.epilogue(sum_MN[:, :outputs], scale_M1, scale_N1, bias_N, dtype)
    if scale_M1.numel() == scale_N1.numel() == 1:
        scales = scale_M1.reshape(()), scale_N1.reshape(())
    else:  # the library has one scale on each side, or one a row on each side
        scale_N1 = scale_N1.expand(outputs, 1)
        scales = scale_M1.expand(rows, 1).contiguous(), F.pad(scale_N1, (0, 0, 0, outer)).t().contiguous()
    bias = None if bias_N is None else F.pad(bias_N.to(dtype), (0, outer))
    y_MN = torch._scaled_mm(q_MK, q_NK.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=fast)
    return y_MN[:, :outputs].contiguous() if outer else y_MN


def padded(codes: Tensor, columns: int, rows: int) -> Tensor:
    """A contiguous matrix of e4m3 codes with zeros on its right and below."""
    if columns or rows:  # as bytes: every device pads those
        return F.pad(codes.view(torch.uint8), (0, columns, 0, rows)).view(FORMAT)
    return codes.contiguous()


class _Fp8Linear(torch.autograd.Function):
    """Forward on codes; backward as if the dequantized operands had been multiplied (straight-through).

    A value beyond a given range has no gradient. Keeps codes and scales for the backward, never a float copy: a quarter
    of what a float32 layer keeps.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype,
        given_N1: Tensor | None,
        input_scale: Tensor | None,
    ) -> Tensor:
        q_NK, scale_N1 = quantize_weight(weight_NK, scheme, given_N1)
        x_MK = x.reshape(-1, x.shape[-1])
        q_MK, scale_M1 = quantize_activations(x_MK, scheme, input_scale)
        y_MN = fp8_matmul(q_MK, scale_M1, q_NK, scale_N1, bias_N, dtype, scheme.accumulation == "fast")
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        for_x = (q_NK, scale_N1) if needs_x else (None, None)
        for_weight = (q_MK, scale_M1) if needs_weight else (None, None)
        beyond_MK = None
        if needs_x and scheme.activations == "static":
            assert input_scale is not None
            beyond_MK = x_MK.abs() > LARGEST * input_scale
        ctx.save_for_backward(*for_x, *for_weight, beyond_MK)
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_NK.dtype
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        return y_MN.view(*x.shape[:-1], weight_NK.shape[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        q_NK, scale_N1, q_MK, scale_M1, beyond_MK = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_MN = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_MK = grad_MN @ dequantize(q_NK, scale_N1, grad.dtype)
            grad_MK = grad_MK if beyond_MK is None else grad_MK.masked_fill_(beyond_MK, 0)  # made just now
            grad_x = grad_MK.view(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:
            grad_weight = (grad_MN.t() @ dequantize(q_MK, scale_M1, grad.dtype)).to(ctx.weight_dtype)
        if needs_bias:
            grad_bias = grad_MN.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer returns for `x`: autocast's dtype where autocast is on, else the dtype of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def fp8_linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    scheme: Scheme,
    given_N1: Tensor | None = None,
    dtype: torch.dtype | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """The layer in training: quantizes the float weight anew, multiplies codes, differentiable in all three.

    Codes and scales do not depend on autocast, which decides the output's dtype.

    Args:
        x: (..., K), floating point.
        weight_NK: (N, K), floating point.
        bias_N: (N,), floating point.
        scheme: where scales are, and how products are summed.
        given_N1: scales of the weight, (1, 1) for one in all; None: they follow from its largest magnitude.
        dtype: of the result; None: autocast's dtype if autocast is on, else that of `x`.
        input_scale: of static activations, one positive float32.

    Returns:
        (..., N).
    """
    return _Fp8Linear.apply(x, weight_NK, bias_N, scheme, dtype or output_dtype(x), given_N1, input_scale)


def fp8_linear_codes(
    x: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """The layer as deployed: from the weight's codes and scales. The arithmetic of `fp8_linear`; no gradient."""
    q_MK, scale_M1 = quantize_activations(x.reshape(-1, x.shape[-1]), scheme, input_scale)
    dtype = dtype or output_dtype(x)
    y_MN = fp8_matmul(q_MK, scale_M1, q_NK, scale_N1, bias_N, dtype, scheme.accumulation == "fast")
    return y_MN.view(*x.shape[:-1], q_NK.shape[0])
