"""Calibrate one integer layer on the activations that it sees: shift, smoothing, range, weight codes, bias.

Shapes: T tokens (rows), K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear.op import dequantize_weight, quantize_activations, quantize_weight
from vit_efficient.kernels.int8_linear.reference import SMALLEST_SCALE
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization import gptq
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int8_layers import Int8Linear, Int8Patches
from vit_efficient.quantization.observers import threshold

EXPONENTS = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)  # of smoothing, tried by `auto`; 0 smooths nothing
SEARCH_ROWS = 4096


@dataclass(frozen=True)
class Fit:
    """What was chosen for a layer. Errors are of its output, relative to the output's own power."""

    name: str
    exponent: float | None
    error: float
    constant: bool
    """Whether its inputs were all zero, or all the same after the shift: nothing could be learned of their range."""


@torch.no_grad()
def fit_layer(
    name: str, layer: Int8Linear | Int8Patches, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig
) -> Fit:
    """Set a layer's shift, smoothing, input scale, weight (with its scales) and bias, in place.

    Args:
        name: for messages.
        layer: its float weight and bias as they were trained; static scales not set yet.
        x_TK: what it sees, float32.
        weight_T: how much each row's error counts; None: all alike.
        config: what may be decided.

    Raises:
        UserError: x is empty or not finite.
    """
    weight_NK = layer.weight.flatten(1).float()
    bias_N = torch.zeros(len(weight_NK), device=weight_NK.device) if layer.bias is None else layer.bias.float()
    target_TN = F.linear(x_TK, weight_NK, bias_N)
    shift_K = _middle(x_TK) if config.shift and layer.scheme.activations == "static" else None
    if shift_K is not None:
        bias_N = bias_N + weight_NK @ shift_K
        x_TK = x_TK - shift_K
    constant = not bool(x_TK.any())
    exponent, smooth_K = _choose_smoothing(layer.scheme, x_TK, weight_NK, weight_T, config)
    if smooth_K is not None:
        x_TK, weight_NK = x_TK / smooth_K, weight_NK * smooth_K
    input_scale = _input_scale(layer.scheme, x_TK, weight_T, config)
    codes, scale_T1 = (None, None) if layer.scheme.activations == "none" else quantize_activations(
        x_TK, layer.scheme, input_scale
    )  # fmt: skip
    seen_TK = x_TK if codes is None else codes.float() * scale_T1
    rounded_NK, weight_scale = _round_weight(layer.scheme, weight_NK, seen_TK, weight_T, config)
    output_TN = F.linear(seen_TK, rounded_NK, bias_N)
    if config.bias_correction:
        change_N = _mean(target_TN - output_TN, weight_T)
        bias_N, output_TN = bias_N + change_N, output_TN + change_N
    _set(layer, weight_NK if weight_scale is None else rounded_NK, bias_N, shift_K, smooth_K, input_scale, weight_scale)
    error = _mean((target_TN - output_TN).square(), weight_T).sum()
    power = _mean(target_TN.square(), weight_T).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return Fit(name, exponent, float(error / power), constant)


def _set(
    layer: Int8Linear | Int8Patches,
    weight_NK: Tensor,
    bias_N: Tensor,
    shift_K: Tensor | None,
    smooth_K: Tensor | None,
    input_scale: Tensor | None,
    weight_scale: Tensor | None,
) -> None:
    layer.weight.copy_(weight_NK.view_as(layer.weight))
    if layer.bias is None:
        layer.bias = nn.Parameter(bias_N.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias_N)
    layer.shift, layer.smooth = shift_K, smooth_K
    layer.input_scale, layer.weight_scale = input_scale, weight_scale


def _middle(x_TK: Tensor) -> Tensor:
    """Half way between the least and the largest value of each channel."""
    return (x_TK.amax(dim=0) + x_TK.amin(dim=0)) / 2


def _mean(x_TN: Tensor, weight_T: Tensor | None) -> Tensor:
    return x_TN.mean(dim=0) if weight_T is None else weight_T @ x_TN / weight_T.sum()


def _choose_smoothing(
    scheme: Scheme, x_TK: Tensor, weight_NK: Tensor, weight_T: Tensor | None, config: CalibrationConfig
) -> tuple[float | None, Tensor | None]:
    """The exponent and the vector that inputs are divided by.

    `auto` tries each exponent on a part of the rows, with weights rounded to nearest, and takes the least output error.
    """
    if config.smooth is None:
        return None, None
    if config.smooth != "auto":
        return config.smooth, _smoothing(x_TK, weight_NK, config.smooth)
    step = max(1, len(x_TK) // SEARCH_ROWS)
    x_TK, weight_T = x_TK[::step], None if weight_T is None else weight_T[::step]
    target_TN = x_TK @ weight_NK.T
    least, best, chosen = float("inf"), 0.0, None
    for exponent in EXPONENTS:
        smooth_K = _smoothing(x_TK, weight_NK, exponent) if exponent else torch.ones_like(weight_NK[0])
        q_NK, scale_NG = quantize_weight(weight_NK * smooth_K, scheme)
        seen_TK = x_TK / smooth_K
        if scheme.activations != "none":
            input_scale = _input_scale(scheme, seen_TK, weight_T, config)
            codes, scale_T1 = quantize_activations(seen_TK, scheme, input_scale)
            seen_TK = codes.float() * scale_T1
        output_TN = seen_TK @ dequantize_weight(q_NK, scale_NG, scheme, torch.float32).T
        error = float(_mean((output_TN - target_TN).square(), weight_T).sum())
        if error < least:
            least, best, chosen = error, exponent, smooth_K
    return best, chosen if best else None


def _smoothing(x_TK: Tensor, weight_NK: Tensor, exponent: float) -> Tensor:
    """``amax(x)^a / amax(w)^(1 - a)`` for each channel (SmoothQuant, equation 4), its geometric mean 1.

    Channels that are always zero, or that no weight reads, are left alone.
    """
    x_K, w_K = x_TK.abs().amax(dim=0), weight_NK.abs().amax(dim=0)
    used_K = (x_K > 0) & (w_K > 0)
    smooth_K = x_K.clamp_min(1e-30) ** exponent / w_K.clamp_min(1e-30) ** (1 - exponent)
    if not bool(used_K.any()):
        return torch.ones_like(x_K)
    smooth_K = smooth_K / smooth_K[used_K].log().mean().exp()
    return torch.where(used_K, smooth_K.clamp(1e-4, 1e4), 1.0)


def _input_scale(scheme: Scheme, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig) -> Tensor | None:
    """The step of static activations, a float32 scalar."""
    if scheme.activations != "static":
        return None
    largest = scheme.largest_activation
    limit = threshold(x_TK, largest, config, weight_T)
    return torch.tensor(max(limit / largest, SMALLEST_SCALE), dtype=torch.float32, device=x_TK.device)


def _round_weight(
    scheme: Scheme, weight_NK: Tensor, seen_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig
) -> tuple[Tensor, Tensor | None]:
    """The weight as its codes stand for it, and its scales; without scales where the largest magnitude decides."""
    if config.rounding == "nearest" or scheme.weights == "tensor":
        q_NK, scale_NG = quantize_weight(weight_NK, scheme)
        return dequantize_weight(q_NK, scale_NG, scheme, torch.float32), None
    counted_TK = seen_TK if weight_T is None else seen_TK * weight_T.unsqueeze(1)
    h_KK = counted_TK.T @ seen_TK / len(seen_TK)
    if config.rounding == "mse":
        group = weight_NK.shape[1] if scheme.group is None else scheme.group
        scale_NG = gptq.search_scales(weight_NK, h_KK.diagonal(), group, scheme.largest_weight)
        q_NK, _ = quantize_weight(weight_NK, scheme, scale_NG)
    else:
        q_NK, scale_NG = gptq.quantize(weight_NK, h_KK, scheme.group, scheme.largest_weight)
    return dequantize_weight(q_NK, scale_NG, scheme, torch.float32), scale_NG
