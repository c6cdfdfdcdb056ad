"""The elementwise passes of the fp8 linear layer as they run: one kernel each on a GPU with fp8 units, elsewhere and
under the compiler, which fuses it, the definition. Codes and scales are the same. Shapes as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.capability import lacks_fp8
from vit_efficient.kernels.fp8_linear import reference
from vit_efficient.kernels.fp8_linear.reference import Scheme
from vit_efficient.kernels.quantize import op as quantization
from vit_efficient.kernels.rows import WIDEST


def _in_one_kernel(x_MK: Tensor) -> bool:
    """Whether a kernel takes these rows."""
    if torch.compiler.is_compiling() or x_MK.device.type != "cuda" or lacks_fp8(x_MK.device) is not None:
        return False
    return x_MK.numel() > 0 and x_MK.shape[1] <= WIDEST


def quantize_weight(weight_NK: Tensor, scheme: Scheme, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_weight`."""
    if scheme.weights == "channel" and given is None and _in_one_kernel(weight_NK):
        return quantization.quantize(weight_NK, "fp8")
    return reference.quantize_weight(weight_NK, scheme, given)


def quantize_activations(x_MK: Tensor, scheme: Scheme, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations`."""
    if scheme.activations != "tensor" and _in_one_kernel(x_MK):
        assert scheme.activations == "token" or scale is not None, "static activations have a scale"
        return quantization.quantize(x_MK, "fp8", scale if scheme.activations == "static" else None)
    return reference.quantize_activations(x_MK, scheme, scale)


def dequantize(codes_MK: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize`."""
    if _in_one_kernel(codes_MK):
        return quantization.dequantize(codes_MK, scale, dtype)
    return reference.dequantize(codes_MK, scale, dtype)
