"""Calibrate one fp8 layer on the activations that it sees: shift, weight codes and scales, bias.

Shapes: T tokens (rows), K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.errors import UserError
from vit_efficient.kernels.fp8_linear.reference import (
    LARGEST,
    SMALLEST_SCALE,
    dequantize,
    quantize_activations,
    quantize_weight,
)
from vit_efficient.quantization import gptq_fp8
from vit_efficient.quantization.calibratable import Fit
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.fp8_layers import TrainableFp8
from vit_efficient.quantization.importance import tempered

# Of a static range over the largest magnitude seen: errors are relative, so room costs the smallest values only, and a
# larger value than was ever seen need not saturate.
HEADROOM = 2


@torch.no_grad()
def fit_fp8(name: str, layer: TrainableFp8, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig) -> Fit:
    """Set a layer's shift, static input scale, weight (with its scales) and bias, in place.

    A float is rounded by its size, so a channel's offset costs precision: `shift` is the mean of each channel, about
    which its mean square is least. Smoothing would change nothing: rounding errors scale with what they are errors of.

    Args:
        name: for messages.
        layer: its float weight and bias as they were trained.
        x_TK: what it sees, float32.
        weight_T: how much each row's error counts; None: all alike.
        config: what may be decided.

    Raises:
        UserError: x is empty or not finite.
    """
    if not x_TK.numel():
        raise UserError("Nothing to calibrate on: a layer saw no activations.")
    if not bool(x_TK.isfinite().all()):
        raise UserError(
            "A layer's activations hold a NaN or an infinity on the calibration images. "
            "Check `model.weights` and the images."
        )
    weight_NK = layer.weight.flatten(1).float()
    bias_N = torch.zeros(len(weight_NK), device=weight_NK.device) if layer.bias is None else layer.bias.float()
    target_TN = F.linear(x_TK, weight_NK, bias_N)
    constant = not bool(x_TK.any())
    # What another kernel quantizes where it makes it has one scale and no shift.
    shift_K = _mean(x_TK, weight_T) if config.shift and not layer.static else None
    if shift_K is not None:
        bias_N = bias_N + weight_NK @ shift_K
        x_TK = x_TK - shift_K
    input_scale = None
    if layer.static:
        input_scale = (HEADROOM * x_TK.abs().amax() / LARGEST).clamp_min(SMALLEST_SCALE)
    seen_TK = dequantize(*quantize_activations(x_TK, layer.scheme, input_scale))
    codes_NK, scale, given = _round_weight(layer, weight_NK, seen_TK, weight_T, config)
    rounded_NK = codes_NK * scale
    output_TN = F.linear(seen_TK, rounded_NK, bias_N)
    if config.bias_correction:
        change_N = _mean(target_TN - output_TN, weight_T)
        bias_N, output_TN = bias_N + change_N, output_TN + change_N
    layer.weight.copy_((rounded_NK if given else weight_NK).view_as(layer.weight))
    if layer.bias is None:
        layer.bias = nn.Parameter(bias_N.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias_N)
    layer.shift, layer.weight_scale = shift_K, scale.squeeze(1) if given else None
    layer.input_scale = input_scale
    error = _mean((target_TN - output_TN).square(), weight_T).sum()
    power = _mean(target_TN.square(), weight_T).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return Fit(name, None, float(error / power), constant)


def _mean(x_TN: Tensor, weight_T: Tensor | None) -> Tensor:
    return x_TN.mean(dim=0) if weight_T is None else weight_T @ x_TN / weight_T.sum()


def _round_weight(
    layer: TrainableFp8, weight_NK: Tensor, seen_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig
) -> tuple[Tensor, Tensor, bool]:
    """Codes as float32, their scales, and whether the scales must be kept (else the largest magnitude decides)."""
    if config.rounding == "nearest":
        codes, scale = quantize_weight(weight_NK, layer.scheme)
        return codes.float(), scale, False
    counted_TK = seen_TK if weight_T is None else seen_TK * tempered(weight_T).unsqueeze(1)
    h_KK = counted_TK.T @ seen_TK / len(seen_TK)
    if config.rounding == "mse":
        scale = gptq_fp8.search_scale(weight_NK, h_KK.diagonal(), layer.scheme)
        return gptq_fp8.nearest(weight_NK / scale), scale, True
    return *gptq_fp8.quantize(weight_NK, h_KK, layer.scheme), True
