"""The fp8 linear layer in plain PyTorch: this file is the definition, every faster form is held against it.

W8A8 in e4m3 (Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433, table 1): 4 bits of exponent,
3 of mantissa, largest value 448, smallest 2**-9, no infinities. Symmetric like the integers of `kernels.int8_linear`,
with the format's own rounding in place of ties to even among integers: ``s = amax / 448``. A weight has one scale an
output row or one in all, an activation one a token or one for all tokens, chosen anew in each forward.

Every e4m3 value is exact in bfloat16, float16 and TF32, so reduced precision of float32 products changes nothing in
the operands. Sums are float32, and unlike integer sums they depend on the order in which they are added: the codes and
scales of two machines are equal to the last bit, outputs only nearly.

Shapes: M tokens (all leading dimensions flattened), K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max  # 448
# Smallest normal float32. A scale never goes below it: zero rows divide by it instead of by zero, and rows of subnormal
# size do not depend on whether the processor flushes subnormals.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Scheme:
    """The choices that the arithmetic depends on.

    Args:
        weights: one scale an output row (`channel`) or one for all (`tensor`).
        activations: one scale a token, or one for all tokens of a forward, so that the outputs of an image depend on
            the images beside it; or a given one (`static`), beyond which values saturate.
        accumulation: float32 sums (`full`), or sums in the fewer bits of the matrix units (`fast`), where they have
            such a mode; elsewhere sums are always float32.
    """

    weights: Literal["channel", "tensor"] = "channel"
    activations: Literal["token", "tensor", "static"] = "token"
    accumulation: Literal["full", "fast"] = "full"

    @classmethod
    def of(cls, described: Any) -> Scheme:
        """From anything with attributes of these names."""
        return cls(**{field.name: getattr(described, field.name) for field in fields(cls)})


def quantize(x_MK: Tensor, *, by_row: bool, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize a matrix to e4m3 with a scale a row, or with one.

    ``scale = amax(|x|) / 448``, at least `SMALLEST_SCALE`, in float32; ``codes = e4m3(clamp(x / scale, -448, 448))``,
    which rounds to nearest, ties to even. Zeros have zero codes. A row (without `by_row`: a matrix) that holds a NaN or
    an infinity has the scale NaN: its codes mean nothing, and every product with them is NaN.

    Args:
        x_MK: floating point.
        by_row: whether each row has a scale of its own.
        given: the scales, where they are not to follow from the largest magnitude; what is beyond them saturates.

    Returns:
        codes (M, K) float8_e4m3fn, and scales (M, 1), or (1, 1), float32.
    """
    x_MK = x_MK.to(torch.float32)
    if by_row:
        amax = x_MK.abs().amax(dim=1, keepdim=True)
    else:
        amax = (x_MK.abs().amax() if x_MK.numel() else x_MK.new_zeros(())).reshape(1, 1)
    # By a tensor: PyTorch divides by a number on CUDA as a product with its reciprocal, which can be one bit off.
    scale = (amax / torch.full_like(amax, LARGEST)).clamp_min(SMALLEST_SCALE) if given is None else given
    # Casts saturate in some versions of PyTorch and give NaN in others: the clamp decides.
    codes = (x_MK / scale).clamp(-LARGEST, LARGEST).to(FORMAT)
    return codes, torch.where(amax.isfinite(), scale, torch.nan)


def quantize_weight(weight_NK: Tensor, scheme: Scheme, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scales, (N, 1) or (1, 1), of a weight; `given` scales are kept."""
    return quantize(weight_NK, by_row=scheme.weights == "channel", given=given)


def quantize_activations(x_MK: Tensor, scheme: Scheme, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (M, K) and scales, (M, 1) or (1, 1), of tokens; `scale` (a scalar) where it is static."""
    if scheme.activations == "static":
        assert scale is not None, "static activations have a scale"
        return quantize(x_MK, by_row=True, given=scale.reshape(1, 1))
    return quantize(x_MK, by_row=scheme.activations == "token")


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``codes * scale``, multiplied in float32, then cast to `dtype`."""
    return (codes.to(torch.float32) * scale).to(dtype)


def product(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    """``q_MK @ q_NK.T`` of e4m3 values with float32 sums: (M, N) float32, on any device, whatever autocast says."""
    with torch.autocast(q_MK.device.type, enabled=False):
        return q_MK.to(torch.float32) @ q_NK.to(torch.float32).T


def epilogue(
    sum_MN: Tensor, scale_M1: Tensor, scale_N1: Tensor, bias_N: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sums to outputs, in one order: ``y = (sum * scale_M1) * scale_N1.T + bias``, each step in float32, then cast."""
    y_MN = (sum_MN * scale_M1) * scale_N1.T
    if bias_N is not None:
        y_MN = y_MN + bias_N.to(torch.float32)
    return y_MN.to(dtype)


def fp8_linear(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    scheme: Scheme,
    dtype: torch.dtype = torch.float32,
    input_scale: Tensor | None = None,
) -> Tensor:
    """The whole layer: quantize both operands, multiply, scale. x (..., K) gives (..., N). No gradient."""
    q_NK, scale_N1 = quantize_weight(weight_NK, scheme)
    q_MK, scale_M1 = quantize_activations(x.reshape(-1, x.shape[-1]), scheme, input_scale)
    y_MN = epilogue(product(q_MK, q_NK), scale_M1, scale_N1, bias_N, dtype)
    return y_MN.view(*x.shape[:-1], weight_NK.shape[0])
