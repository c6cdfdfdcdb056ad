"""Mixed-precision attention as it runs: in training the definition's forward with its straight-through gradient; and
without gradient `int8_attend`, a Triton kernel on a GPU.

Shapes: B batch, H heads, N queries, M keys, E width of queries and keys, F width of values.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.errors import CapabilityError
from vit_efficient.kernels import attention_values, capability
from vit_efficient.kernels.attention_backward import drop, gradients
from vit_efficient.kernels.int8_attention import reference
from vit_efficient.kernels.int8_attention.reference import (
    Granularity,
    Keys,
    Scales,
    Values,
    dequantize,
    int8_matmul,
    logits,
    quantize,
    quantize_keys,
    quantize_tensor_scale,
    quantize_values,
    softmax,
)
from vit_efficient.kernels.int8_linear.op import output_dtype
from vit_efficient.kernels.int8_linear.reference import LARGEST_CODE


@torch.library.custom_op("vit_efficient::int8_attend", mutates_args=())
def _int8_attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    values: str,
    keys: str,
    out_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`int8_attend` with its output in memory order, (B, N, H, F)."""
    if q_BHNE.device.type == "cuda":
        if values == "fp8" and (reason := capability.lacks_fp8(q_BHNE.device)):
            raise CapabilityError(f"Int8 attention with values=fp8 cannot run: {reason} Take values=float.")
        if (reason := refusal(q_BHNE, v_BHMF)) is None:
            from vit_efficient.kernels.int8_attention import triton

            forms = (q_scale, k_scale, v_scale, scale, values, keys, out_scale, dtype)
            return triton.attend(q_BHNE, k_BHME, v_BHMF, *forms)
        say_slow(reason)
    options = {"scale": scale, "values": values, "keys": keys, "out_scale": out_scale, "dtype": dtype}
    y_BHNF = reference.attend(q_BHNE, k_BHME, v_BHMF, q_scale, k_scale, v_scale, **options)  # type: ignore[arg-type]
    return y_BHNF.transpose(1, 2).contiguous()


@_int8_attend.register_fake
def _(q, k, v, q_scale, k_scale, v_scale, scale, values, keys, out_scale, dtype):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1]), dtype=dtype if out_scale is None else torch.int8)


def refusal(q_BHNE: Tensor, v_BHMF: Tensor) -> str | None:
    """Why the kernel cannot take operands of this width on their GPU; None if it can."""
    return capability.lacks_triton(q_BHNE.device) or capability.too_wide("The kernel", q_BHNE, v_BHMF)


@functools.cache
def say_slow(reason: str) -> None:
    """Say once that the definition runs on a GPU in place of the kernel, and why."""
    warnings.warn(
        f"int8 attention runs as plain PyTorch here, which holds all logits in memory and is slower than "
        f"quantization.attention=none: {reason}",
        stacklevel=2,
    )


def int8_attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float,
    values: Values = "int8",
    keys: Keys = "token",
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.attend`, by a kernel where there is a GPU: operands in any form; no bias, mask, dropout or gradient.

    Args:
        q_BHNE: queries: floating point, or int8 codes; strided views are welcome.
        k_BHME: keys, likewise.
        v_BHMF: values, likewise; floating point where `values` is not ``int8``.
        q_scale: with floating-point queries None (one scale a token and head is chosen) or a calibrated number; with
            codes their scales, one number or (B, H, N, 1). float32, on the device: nothing waits for the host.
        k_scale: of the keys.
        v_scale: of the values; None where they are not int8.
        scale: factor on the logits.
        values: how values are multiplied: quantized to int8 and back (``int8``, the definition), as they are
            (``float``: give what a projection put out in bf16 or fp16), or in e4m3 like the attention weights
            (``fp8``, from sm_89).
        keys: of floating-point keys whose scales are chosen here: one a token and head (the definition of
            `int8_attention`), or one a head and block of 128 tokens, which is faster.
        out_scale: quantize the output to int8 with this number, a float32 scalar on the device (equation 17). One a
            token would need the largest magnitude over all heads, and a kernel's program sees one head.
        dtype: of the output otherwise; None: autocast's if autocast is on, else that of the values (float32, if those
            are codes).

    Returns:
        (B, H, N, F), a view of (B, N, H, F) memory.

    On a GPU older than sm_80, or with heads wider than 128, the definition runs, and says so once.

    Raises:
        CapabilityError: ``fp8`` values on a GPU that has no units for them.
        ValueError: shapes that do not fit each other.
    """
    scales = ("queries", q_BHNE, q_scale), ("keys", k_BHME, k_scale), ("values", v_BHMF, v_scale)
    capability.check_operands(q_BHNE, k_BHME, v_BHMF, *scales, what="int8 attention")
    if dtype is None:
        dtype = output_dtype(v_BHMF) if v_BHMF.dtype.is_floating_point else torch.float32
    y_BNHF = _int8_attend(q_BHNE, k_BHME, v_BHMF, q_scale, k_scale, v_scale, scale, values, keys, out_scale, dtype)
    return y_BNHF.transpose(1, 2)


class _Int8Attention(torch.autograd.Function):
    """Forward on integers; backward as if float attention had been given the dequantized operands (straight-through).

    A value beyond a calibrated range has no gradient. Keeps codes and scales for the backward, which computes the
    attention weights again, and takes them as they are where the forward rounds them to e4m3.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q_BHNE: Tensor,
        k_BHME: Tensor,
        v_BHMF: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        dropped: Tensor | None,
        scale: float,
        granularity: Granularity,
        values: Values,
        keys: Keys,
        dtype: torch.dtype,
        *given: Tensor | None,
    ) -> Tensor:
        operands = (q_BHNE, k_BHME, v_BHMF)
        q, q_scale = quantize(q_BHNE, granularity, given[0])
        k, k_scale = quantize_keys(k_BHME, keys, granularity, given[1])
        v, v_scale = quantize_values(v_BHMF, values, granularity, given[2])
        if q.device.type == "cuda" and bias is None and mask is None and dropped is None:
            ready = (v, v_scale) if values == "int8" else (v_BHMF, None)
            y_BHNF = int8_attend(q, k, ready[0], q_scale, k_scale, ready[1], scale=scale, values=values, dtype=dtype)
        else:
            s_BHNM = logits(int8_matmul(q, k), q_scale, k_scale, scale, bias, mask)
            if values == "fp8":
                y_BHNF = attention_values.weigh_rounded(s_BHNM, dequantize(v, v_scale), dropped)
            else:
                with torch.autocast(s_BHNM.device.type, enabled=False):
                    y_BHNF = drop(softmax(s_BHNM), dropped) @ dequantize(v, v_scale)
        beyond = [None if s is None else _beyond(x, s) for x, s in zip(operands, given, strict=True)]
        ctx.save_for_backward(q, q_scale, k, k_scale, v, v_scale, *beyond, bias, mask, dropped)
        ctx.scale, ctx.dtypes = scale, [x.dtype for x in operands]
        return y_BHNF.to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        q, q_scale, k, k_scale, v, v_scale, *beyond, bias, mask, dropped = ctx.saved_tensors
        p_BHNM = softmax(logits(int8_matmul(q, k), q_scale, k_scale, ctx.scale, bias, mask))
        values = dequantize(q, q_scale), dequantize(k, k_scale), dequantize(v, v_scale)
        grad_q, grad_k, grad_v, grad_s = gradients(grad, p_BHNM, *values, ctx.scale, dropped)
        grads = [
            (one if out is None else one.masked_fill(out, 0)).to(dtype)
            for one, out, dtype in zip((grad_q, grad_k, grad_v), beyond, ctx.dtypes, strict=True)
        ]
        grad_bias = grad_s.sum_to_size(bias.shape).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return (*grads, grad_bias, *(None,) * 10)


def _beyond(x: Tensor, scale: Tensor) -> Tensor:
    """Where a calibrated scale makes a value saturate."""
    return x.to(torch.float32).abs() / scale > LARGEST_CODE


def int8_attention(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float,
    dropout: float = 0.0,
    granularity: Granularity = "token",
    scales: Scales | None = None,
    values: Values = "int8",
    keys: Keys = "token",
) -> Tensor:
    """`reference.int8_attention`, differentiable in queries, keys, values and bias.

    Integers, scales, softmax and both products do not depend on autocast, which decides the output's dtype only.

    Args:
        q_BHNE: queries, floating point; strided views are welcome.
        k_BHME: keys.
        v_BHMF: values.
        bias: added to the scaled logits; broadcasts to (B, H, N, M).
        mask: True where a query may look at a key; broadcasts likewise.
        scale: factor on the logits.
        dropout: probability of dropping an attention weight; the others grow by 1 / (1 - dropout).
        granularity: of scales that are chosen in each forward: one a token and head, or one a tensor.
        scales: calibrated ones of queries, keys and values, each one positive float32, in place of those; None of
            values that are not int8.
        values: how values are multiplied, as of `int8_attend`.
        keys: what shares a scale among keys whose scales are chosen in each forward, as of `int8_attend`.

    Returns:
        (B, H, N, F), in autocast's dtype if autocast is on, else in that of the values.
    """
    dtype = output_dtype(v_BHMF)
    if q_BHNE.device.type == "cuda":
        wants = {"a position bias": bias is not None, "a mask": mask is not None, "dropout": dropout > 0}
        if asked := " and ".join(what for what, wanted in wants.items() if wanted):
            if not torch.compiler.is_compiling():
                say_slow(f"the kernel has no {asked.removeprefix('a ')}, and this attention has {asked}.")
        elif not (torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHNE, k_BHME, v_BHMF))):
            given = _scales(q_BHNE, k_BHME, v_BHMF, granularity, scales, values)
            return int8_attend(q_BHNE, k_BHME, v_BHMF, *given, scale=scale, values=values, keys=keys, dtype=dtype)
    dropped = None
    if dropout > 0:
        shape = (*q_BHNE.shape[:-1], k_BHME.shape[-2])
        dropped = F.dropout(torch.ones(shape, device=q_BHNE.device), dropout)
    given = (None, None, None) if scales is None else scales
    forms = (scale, granularity, values, keys, dtype)
    return _Int8Attention.apply(q_BHNE, k_BHME, v_BHMF, bias, mask, dropped, *forms, *given)


def _scales(
    q_BHNE: Tensor, k_BHME: Tensor, v_BHMF: Tensor, granularity: Granularity, scales: Scales | None, values: Values
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What `int8_attend` is to be given; scales of whole tensors are chosen here."""
    if scales is not None:
        return scales
    if granularity == "token":
        return None, None, None
    q, k = quantize_tensor_scale(q_BHNE), quantize_tensor_scale(k_BHME)
    return q, k, quantize_tensor_scale(v_BHMF) if values == "int8" else None
