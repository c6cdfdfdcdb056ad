"""The elementwise passes of the integer linear layer as they run: on a CPU in blocks that fit its cache, on a GPU one
kernel each. Equal to `reference` bit for bit. Shapes as there: M tokens, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.device import runs_triton, runs_triton_constant
from vit_efficient.kernels.int8_linear import reference
from vit_efficient.kernels.int8_linear.reference import LARGEST_CODE, SMALLEST_SCALE
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.kernels.quantize import op as quantization
from vit_efficient.kernels.quantize import reference as definition
from vit_efficient.kernels.rows import WIDEST as WIDEST_ROW

FORMS = {127: "int8", 7: "int4"}  # names of the formats by their largest code
# Elements that elementwise passes take at once on a CPU: 512 KiB of float32 stay in its second-level cache.
BLOCK = 2**17
# Columns of a row that a compiled program holds at once. Of wider ones it makes the elements twice, for the largest and
# for the codes: a GELU's with its erf, 0.44 ms where GELU and a kernel for the codes take 0.17 (25,216 x 4,096, H200).
HELD = 1024


def _blocks(tensor: Tensor) -> list[slice]:
    """Row ranges of a matrix that fit the cache of a CPU; the whole matrix elsewhere."""
    rows, columns = tensor.shape
    step = max(1, BLOCK // max(1, columns)) if tensor.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _in_one_kernel(x_MK: Tensor) -> bool:
    """Whether a kernel takes these rows."""
    return runs_triton(x_MK) and x_MK.numel() > 0 and x_MK.shape[1] <= WIDEST_ROW


def empty_codes(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Of no numbers."""
    return x_MK.to(torch.int8), x_MK.new_ones((x_MK.shape[0], 1), dtype=torch.float32)


def quantize_rows(x_MK: Tensor, largest: int = LARGEST_CODE) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` of a matrix in fewer passes: two reductions in place of |x|, and no clamp.

    The clamp can be left out because the scale comes from the row itself: |x| / scale exceeds it by rounding only.
    Codes of rows that are not finite are unspecified; their scale is NaN.
    """
    if torch.compiler.is_compiling():
        if x_MK.is_cuda and HELD < x_MK.shape[1] <= WIDEST_ROW and runs_triton_constant(x_MK.device.index):
            return quantization.quantize(x_MK, FORMS[largest])
        return reference.quantize_rows(x_MK, largest)  # which the compiler fuses by itself
    if _in_one_kernel(x_MK):
        return quantization.quantize(x_MK, FORMS[largest])
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
    if _in_one_kernel(q_MK):
        return quantization.dequantize(q_MK, scale_M1, dtype)
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
    if _in_one_kernel(x_MK):
        return quantization.quantize(x_MK, FORMS[largest], scale)
    q_MK = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
    for rows in _blocks(x_MK):
        q_MK[rows].copy_((x_MK[rows].to(torch.float32) / scale).round_().clamp_(-largest, largest))
    bad_M1 = x_MK.amax(dim=1, keepdim=True).isnan()  # the maximum passes a NaN on
    return q_MK, torch.where(bad_M1, torch.nan, scale.reshape(1, 1))


def quantize_clipping(x_MK: Tensor, scale: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_given`, and where a value lies beyond the range: what the straight-through gradient leaves out."""
    if not torch.compiler.is_compiling() and _in_one_kernel(x_MK):
        return quantization.quantize_clipping(x_MK, FORMS[largest], scale)
    codes, scale_M1 = quantize_given(x_MK, scale, largest) if x_MK.numel() else empty_codes(x_MK)
    return codes, scale_M1, definition.beyond(x_MK, FORMS[largest], scale)


def quantize_activations(x_MK: Tensor, scheme: Scheme, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_activations`."""
    if scheme.activations == "token":
        return quantize_rows(x_MK, scheme.largest_activation)
    if scheme.activations == "static" and x_MK.numel():
        assert scale is not None, "static activations have a scale"
        return quantize_given(x_MK, scale, scheme.largest_activation)
    if not x_MK.numel() and scheme.activations != "none":
        return empty_codes(x_MK)
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
