"""The linear layer with 4-bit weights in groups: the definition, in plain PyTorch, from the form that is stored.

Stored (`quantization.int8_deployed`, `kernels.int8_linear.packing`): two codes a byte, the even input in the low half;
the group's zero point, or 8, has been added to a code, so that it lies in 0 .. 15. Each output row has a bfloat16
scale, and where there are zero points a byte, for every `group` inputs; the last group may be shorter.

Without quantized activations (`none`): ``w = dtype(float32(code) * scale)``, ``y = x @ w^T + bias``, in `dtype` with
float32 sums. With a scale a token (`token`): the integer product of `int8_linear.reference.grouped_matmul`: exact sums
in each group, times its scale, added in float32, then the epilogue.

Shapes: M tokens, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear import reference as int8
from vit_efficient.kernels.int8_linear.packing import unpack

Activations = Literal["none", "token"]


def codes_of(packed_NK: Tensor, zero_NG: Tensor | None, inputs: int, group: int) -> Tensor:
    """Weight codes (N, K) int8, the zero point or 8 taken off: within -15 .. 15, or -8 .. 7."""
    if zero_NG is None:
        return unpack(packed_NK, inputs)
    return unpack(packed_NK, inputs, zero_NG.to(torch.int8).repeat_interleave(group, dim=1)[:, :inputs])


def int4_linear(
    x_MK: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    *,
    group: int,
    activations: Activations = "none",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(M, N) in `dtype`.

    Args:
        x_MK: floating point.
        packed_NK: (N, ceil(K / 2)) uint8.
        scale_NG: bfloat16 or float32.
        zero_NG: uint8, 0 .. 15; None: codes are symmetric.
        bias_N: floating point, or None.
        group: inputs that share a scale.
        activations: whether they are quantized to int8, with a scale a token.
        dtype: of the result, and of the operands where activations are not quantized.
    """
    if activations == "token":
        q_MK, scale_M1 = int8.quantize_rows(x_MK)
        return int4_linear_codes(q_MK, scale_M1, packed_NK, scale_NG, zero_NG, bias_N, group=group, dtype=dtype)
    inputs = x_MK.shape[1]
    q_NK, scale_NG = codes_of(packed_NK, zero_NG, inputs, group), scale_NG.to(torch.float32)
    weight_NK = (q_NK.to(torch.float32) * scale_NG.repeat_interleave(group, dim=1)[:, :inputs]).to(dtype)
    with torch.autocast(x_MK.device.type, enabled=False):
        return F.linear(x_MK.to(dtype), weight_NK, None if bias_N is None else bias_N.to(dtype))


def int4_linear_codes(
    q_MK: Tensor,
    scale_M1: Tensor,
    packed_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    bias_N: Tensor | None,
    *,
    group: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same from activations that are quantized already: (M, N) in `dtype`.

    Args:
        q_MK: their codes, int8.
        scale_M1: the scales of rows, (M, 1) or (1, 1) float32.
    """
    q_NK, scale_NG = codes_of(packed_NK, zero_NG, q_MK.shape[1], group), scale_NG.to(torch.float32)
    sum_MN = int8.grouped_matmul(q_MK, q_NK, scale_NG, group)
    return int8.epilogue(sum_MN, scale_M1, scale_NG.new_ones(scale_NG.shape[0]), bias_N, dtype)
