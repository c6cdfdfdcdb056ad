"""fp8 attention as it runs: a Triton kernel on GPUs with fp8 matrix units, the definition on a CPU; in training with a
straight-through gradient.

Shapes as in `reference`.
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
from vit_efficient.kernels.fp8_attention import reference
from vit_efficient.kernels.fp8_attention.reference import Values
from vit_efficient.kernels.fp8_linear.reference import FORMAT
from vit_efficient.kernels.int8_attention.reference import dequantize, quantize_values, softmax
from vit_efficient.kernels.int8_linear.op import output_dtype


@torch.library.custom_op("vit_efficient::fp8_attend", mutates_args=())
def _fp8_attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    scale: float,
    rotated: bool,
    values: str,
    out_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`fp8_attend` with its output in memory order, (B, N, H, F)."""
    if q_BHNE.device.type == "cuda":
        if reason := refusal(q_BHNE, v_BHMF):
            raise CapabilityError(f"fp8 attention cannot run: {reason}")
        from vit_efficient.kernels.fp8_attention import triton

        return triton.attend(q_BHNE, k_BHME, v_BHMF, scale, rotated, values, out_scale, dtype)
    options = {"scale": scale, "rotated": rotated, "values": values, "out_scale": out_scale, "dtype": dtype}
    y_BHNF = reference.attend(q_BHNE, k_BHME, v_BHMF, **options)  # type: ignore[arg-type]
    return y_BHNF.transpose(1, 2).contiguous()


@_fp8_attend.register_fake
def _(q, k, v, scale, rotated, values, out_scale, dtype):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1]), dtype=dtype if out_scale is None else FORMAT)


def refusal(q_BHNE: Tensor, v_BHMF: Tensor) -> str | None:
    """Why the kernel cannot take these tensors on their GPU, and what to do instead; None if it can."""
    if reason := capability.lacks_fp8(q_BHNE.device):
        return f"{reason} Take int8 attention (quantization.attention=dynamic), which runs from sm_80."
    return capability.too_wide("fp8 attention", q_BHNE, v_BHMF)


def fp8_attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    *,
    scale: float,
    rotated: bool = True,
    values: Values = "float",
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`reference.attend`, by a kernel where there is a GPU: no bias, mask, dropout or gradient.

    Args:
        q_BHNE: queries, floating point; strided views are welcome.
        k_BHME: keys.
        v_BHMF: values; bf16 or fp16 where `values` is ``float``, on a GPU.
        scale: factor on the logits.
        rotated: whether queries and keys are rotated before they are quantized (incoherent processing).
        values: how values are multiplied: as they are (``float``), or in e4m3 like the attention weights (``fp8``).
        out_scale: quantize the output to e4m3 with this number, a float32 scalar on the device. One a token would need
            the largest magnitude over all heads, and a kernel's program sees one head.
        dtype: of the output otherwise; None: autocast's if autocast is on, else that of the values.

    Returns:
        (B, H, N, F), a view of (B, N, H, F) memory.

    Raises:
        CapabilityError: the GPU has no fp8 matrix units (they came with sm_89), or heads are wider than 128.
        ValueError: shapes that do not fit each other.
    """
    capability.check_operands(q_BHNE, k_BHME, v_BHMF, what="fp8 attention")
    dtype = output_dtype(v_BHMF) if dtype is None else dtype
    return _fp8_attend(q_BHNE, k_BHME, v_BHMF, scale, rotated, values, out_scale, dtype).transpose(1, 2)


@functools.cache
def say_slow(extras: str) -> None:
    """Say once that the definition runs on a GPU in place of the kernel, and why."""
    warnings.warn(
        f"fp8 attention runs as plain PyTorch here, which holds all logits in memory and is slower than "
        f"quantization.attention=none: the kernel has no {extras}.",
        stacklevel=2,
    )


class _Fp8Attention(torch.autograd.Function):
    """Forward on codes; backward as if float attention had been given the dequantized operands (straight-through).

    Keeps the operands for the backward, which makes codes and attention weights again, and takes the weights as they
    are where the forward rounds them to e4m3.
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
        values: Values,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(q_BHNE, k_BHME, v_BHMF, bias, mask, dropped)
        ctx.scale, ctx.values = scale, values
        if q_BHNE.device.type == "cuda" and bias is None and mask is None and dropped is None:
            return fp8_attend(q_BHNE, k_BHME, v_BHMF, scale=scale, values=values, dtype=dtype)
        s_BHNM = reference.logits(reference.operands(q_BHNE, k_BHME), scale, bias, mask)
        v_value = dequantize(*quantize_values(v_BHMF, values))
        if values == "fp8":
            return attention_values.weigh_rounded(s_BHNM, v_value, dropped).to(dtype)
        with torch.autocast(s_BHNM.device.type, enabled=False):
            return (drop(softmax(s_BHNM), dropped) @ v_value).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        q_BHNE, k_BHME, v_BHMF, bias, mask, dropped = ctx.saved_tensors
        made = reference.operands(q_BHNE, k_BHME)
        p_BHNM = softmax(reference.logits(made, ctx.scale, bias, mask))
        values = dequantize(made.q, made.q_rows), dequantize(made.k, made.k_rows)
        v_value = dequantize(*quantize_values(v_BHMF, ctx.values))
        rotated_q, rotated_k, grad_v, grad_s = gradients(
            grad, p_BHNM, *values, v_value, ctx.scale / made.divisor, dropped
        )
        back = reference.rotation(q_BHNE.shape[-1], q_BHNE.device).mT
        with torch.autocast(grad.device.type, enabled=False):
            grad_q, grad_k = rotated_q @ back, rotated_k @ back
        pairs = ((grad_q, q_BHNE), (grad_k, k_BHME), (grad_v, v_BHMF))
        grad_bias = grad_s.sum_to_size(bias.shape).to(bias.dtype) if ctx.needs_input_grad[3] else None
        return (*(one.to(x.dtype) for one, x in pairs), grad_bias, *(None,) * 5)


def fp8_attention(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float,
    dropout: float = 0.0,
    values: Values = "float",
) -> Tensor:
    """`reference.attend` with rotation, differentiable in queries, keys, values and bias.

    Args:
        q_BHNE: queries, floating point; strided views are welcome.
        k_BHME: keys.
        v_BHMF: values.
        bias: added to the scaled logits; broadcasts to (B, H, N, M).
        mask: True where a query may look at a key; broadcasts likewise.
        scale: factor on the logits.
        dropout: probability of dropping an attention weight; the others grow by 1 / (1 - dropout).
        values: how values are multiplied, as of `fp8_attend`.

    Returns:
        (B, H, N, F), in autocast's dtype if autocast is on, else in that of the values.

    Raises:
        CapabilityError: as of `fp8_attend`, on a GPU without bias, mask and dropout.
    """
    dtype, dropped = output_dtype(v_BHMF), None
    if q_BHNE.device.type == "cuda" and not torch.compiler.is_compiling():
        wants = {"position bias": bias is not None, "mask": mask is not None, "dropout": dropout > 0}
        if asked := " and no ".join(what for what, wanted in wants.items() if wanted):
            say_slow(asked)
    if dropout > 0:
        shape = (*q_BHNE.shape[:-1], k_BHME.shape[-2])
        dropped = F.dropout(torch.ones(shape, device=q_BHNE.device), dropout)
    return _Fp8Attention.apply(q_BHNE, k_BHME, v_BHMF, bias, mask, dropped, scale, values, dtype)
