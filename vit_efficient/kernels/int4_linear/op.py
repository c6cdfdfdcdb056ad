"""The layer with 4-bit weights as it runs: a Triton kernel that unpacks in registers on a GPU, else the definition.

Shapes as in `reference`: M tokens, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vit_efficient.kernels.device import runs_triton
from vit_efficient.kernels.int4_linear import reference
from vit_efficient.kernels.int4_linear.reference import Activations


@torch.library.custom_op("vit_efficient::int4_linear", mutates_args=())
def _int4_linear(
    x_MK: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    group: int,
    activations: str,
    dtype: torch.dtype,
) -> Tensor:
    """`int4_linear` of a matrix."""
    if runs_triton(x_MK) and x_MK.numel() and packed_NK.numel():
        from vit_efficient.kernels.int4_linear import triton

        return triton.int4_linear(x_MK, packed_NK, scale_NG, zero_NG, bias_N, group, activations, dtype)
    options: dict[str, Any] = {"group": group, "activations": activations, "dtype": dtype}
    return reference.int4_linear(x_MK, packed_NK, scale_NG, zero_NG, bias_N, **options)


@_int4_linear.register_fake
def _(x, packed, scale, zero, bias, group, activations, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], packed.shape[0]), dtype=dtype)


@torch.library.custom_op("vit_efficient::int4_linear_codes", mutates_args=())
def _int4_linear_codes(
    q_MK: Tensor,
    scale_M1: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """`int4_linear_codes` of a matrix."""
    if runs_triton(q_MK) and q_MK.numel() and packed_NK.numel():
        from vit_efficient.kernels.int4_linear import triton

        return triton.int4_linear_codes(q_MK, scale_M1, packed_NK, scale_NG, zero_NG, bias_N, group, dtype)
    weight = packed_NK, scale_NG, zero_NG
    return reference.int4_linear_codes(q_MK, scale_M1, *weight, bias_N, group=group, dtype=dtype)


@_int4_linear_codes.register_fake
def _(q, q_scale, packed, scale, zero, bias, group, dtype):  # type: ignore[no-untyped-def]
    return q.new_empty((q.shape[0], packed.shape[0]), dtype=dtype)


def int4_linear(
    x: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    *,
    group: int,
    activations: Activations = "none",
    dtype: torch.dtype,
) -> Tensor:
    """`reference.int4_linear` of (..., K) to (..., N). No gradient.

    On a GPU from sm_80 the weight is unpacked in registers: no float copy of it is ever in memory. Elsewhere the
    definition runs, which makes one for the time of the call.
    """
    y_MN = _int4_linear(x.reshape(-1, x.shape[-1]), packed_NK, scale_NG, zero_NG, bias_N, group, activations, dtype)
    return y_MN.view(*x.shape[:-1], packed_NK.shape[0])


def int4_linear_codes(
    q: Tensor,
    scale: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    *,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.int4_linear_codes` of int8 codes (..., K), with scales (..., 1) or one in all: (..., N). No gradient.

    For whom the codes are at hand, of any activations; the weight is unpacked as by `int4_linear`.
    """
    operands = q.reshape(-1, q.shape[-1]), scale.reshape(-1, 1)
    y_MN = _int4_linear_codes(*operands, packed_NK, scale_NG, zero_NG, bias_N, group, dtype)
    return y_MN.view(*q.shape[:-1], packed_NK.shape[0])
