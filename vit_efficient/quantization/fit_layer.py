"""Calibrate one integer layer on the activations that it sees: shift, smoothing, range, weight codes, bias.

Shapes: T tokens (rows), K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.errors import UserError
from vit_efficient.kernels.int8_linear.op import dequantize_weight, quantize_activations, quantize_weight
from vit_efficient.kernels.int8_linear.reference import SMALLEST_SCALE
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization import gptq
from vit_efficient.quantization.calibratable import Fit
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.importance import tempered
from vit_efficient.quantization.int8_layers import TrainableInt8
from vit_efficient.quantization.observers import largest_magnitude, threshold

# Of smoothing, tried by `auto`: first nothing.
EXPONENTS = (None, 0.5, 0.65, 0.8, 0.9, 1.0)
WEIGHT_ONLY_EXPONENTS = (None, 0.1, 0.2, 0.3, 0.4, 0.5)
SEARCH_ROWS = 4096


@torch.no_grad()
def fit_layer(name: str, layer: TrainableInt8, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig) -> Fit:
    """Set a layer's shift, smoothing, input scale, weight (with its scales) and bias, in place.

    Args:
        name: for messages.
        layer: its float weight and bias as they were trained; static scales not set yet.
        x_TK: what it sees, float32.
        weight_T: how much each row's error counts; None: all alike.
        config: what may be decided.

    Raises:
        UserError: x is empty; x or the weight holds a NaN or an infinity. The layer is then left as it was.
    """
    largest_magnitude(x_TK)
    weight_NK = layer.weight.flatten(1).float()
    if not bool(weight_NK.isfinite().all()):
        raise UserError("The weight holds a NaN or an infinity. Check `model.weights`.")
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
    seen_TK = _seen(layer.scheme, x_TK, input_scale)
    rounded_NK, grid = _round_weight(layer.scheme, weight_NK, seen_TK, weight_T, config)
    output_TN = F.linear(seen_TK, rounded_NK, bias_N)
    if config.bias_correction:
        change_N = _mean(target_TN - output_TN, weight_T)
        bias_N, output_TN = bias_N + change_N, output_TN + change_N
    _set(layer, weight_NK if grid is None else rounded_NK, bias_N, shift_K, smooth_K, input_scale, grid)
    error = _mean((target_TN - output_TN).square(), weight_T).sum()
    power = _mean(target_TN.square(), weight_T).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return Fit(name, exponent, float(error / power), constant)


def _set(
    layer: TrainableInt8,
    weight_NK: Tensor,
    bias_N: Tensor,
    shift_K: Tensor | None,
    smooth_K: Tensor | None,
    input_scale: Tensor | None,
    grid: gptq.Grid | None,
) -> None:
    layer.weight.copy_(weight_NK.view_as(layer.weight))
    if layer.bias is None:
        layer.bias = nn.Parameter(bias_N.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias_N)
    layer.shift, layer.smooth = shift_K, smooth_K
    layer.input_scale = input_scale
    layer.weight_scale, layer.weight_zero = (None, None) if grid is None else (grid.scale, grid.zero)


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
        return config.smooth, _smoothing(scheme, x_TK, weight_NK, config.smooth)
    step = max(1, len(x_TK) // SEARCH_ROWS)
    x_TK, weight_T = x_TK[::step], None if weight_T is None else weight_T[::step]
    target_TN = x_TK @ weight_NK.T
    least, best, chosen = float("inf"), None, None
    ones_K = torch.ones_like(weight_NK[0])
    for exponent in WEIGHT_ONLY_EXPONENTS if scheme.activations == "none" else EXPONENTS:
        smooth_K = ones_K if exponent is None else _smoothing(scheme, x_TK, weight_NK, exponent)
        q_NK, scale_NG = quantize_weight(weight_NK * smooth_K, scheme)
        seen_TK = x_TK / smooth_K
        seen_TK = _seen(scheme, seen_TK, _input_scale(scheme, seen_TK, weight_T, config))
        output_TN = seen_TK @ dequantize_weight(q_NK, scale_NG, scheme, torch.float32).T
        error = float(_mean((output_TN - target_TN).square(), weight_T).sum())
        if error < least:
            least, best, chosen = error, exponent, smooth_K
    return best, None if best is None else chosen


def _smoothing(scheme: Scheme, x_TK: Tensor, weight_NK: Tensor, exponent: float) -> Tensor:
    """``amax(x)^a / amax(w)^(1 - a)`` for each channel (SmoothQuant, equation 4), its geometric mean 1.

    Where activations are not quantized ``mean(|x|)^a``: weights that meet large activations are made larger, so
    that their rounding errors count less (AWQ, Lin et al., arXiv:2306.00978, equation 5).

    Channels that are always zero, or that no weight reads, are left alone.
    """
    x_K, w_K = x_TK.abs().amax(dim=0), weight_NK.abs().amax(dim=0)
    used_K = (x_K > 0) & (w_K > 0)
    if scheme.activations == "none":
        smooth_K = x_TK.abs().mean(dim=0).clamp_min(1e-30) ** exponent
    else:
        smooth_K = x_K.clamp_min(1e-30) ** exponent / w_K.clamp_min(1e-30) ** (1 - exponent)
    if not bool(used_K.any()):
        return torch.ones_like(x_K)
    smooth_K = smooth_K / smooth_K[used_K].log().mean().exp()
    return torch.where(used_K, smooth_K.clamp(1e-4, 1e4), 1.0)


def _seen(scheme: Scheme, x_TK: Tensor, input_scale: Tensor | None) -> Tensor:
    """The activations as their codes stand for them."""
    if scheme.activations == "none":
        return x_TK
    codes_TK, scale_T1 = quantize_activations(x_TK, scheme, input_scale)
    return codes_TK.float() * scale_T1


def _input_scale(scheme: Scheme, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig) -> Tensor | None:
    """The step of static activations, a float32 scalar."""
    if scheme.activations != "static":
        return None
    largest = scheme.largest_activation
    limit = threshold(x_TK, largest, config, weight_T)
    return torch.tensor(max(limit / largest, SMALLEST_SCALE), dtype=torch.float32, device=x_TK.device)


def _round_weight(
    scheme: Scheme, weight_NK: Tensor, seen_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig
) -> tuple[Tensor, gptq.Grid | None]:
    """The weight as its codes stand for it, and its grid; without one where the largest magnitude decides."""
    if config.rounding == "nearest" or scheme.weights == "tensor":
        q_NK, scale_NG = quantize_weight(weight_NK, scheme)
        return dequantize_weight(q_NK, scale_NG, scheme, torch.float32), None
    counted_TK = seen_TK if weight_T is None else seen_TK * tempered(weight_T).unsqueeze(1)
    h_KK = counted_TK.T @ seen_TK / len(seen_TK)
    if config.rounding == "mse":
        grid = gptq.search_grid(weight_NK, h_KK.diagonal(), scheme)
        q_NK, _ = quantize_weight(weight_NK, scheme, grid.scale, grid.zero)
    else:
        q_NK, grid = gptq.quantize(weight_NK, h_KK, scheme)
    return dequantize_weight(q_NK, grid.scale, scheme, torch.float32), grid
