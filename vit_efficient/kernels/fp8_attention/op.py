"""fp8 attention as it runs: a Triton kernel on GPUs with fp8 matrix units, the definition on a CPU.

Shapes as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.errors import CapabilityError
from vit_efficient.kernels import capability
from vit_efficient.kernels.fp8_attention import reference
from vit_efficient.kernels.fp8_attention.reference import Values
from vit_efficient.kernels.fp8_linear.reference import FORMAT
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
    """
    dtype = output_dtype(v_BHMF) if dtype is None else dtype
    return _fp8_attend(q_BHNE, k_BHME, v_BHMF, scale, rotated, values, out_scale, dtype).transpose(1, 2)
