"""Codes of a weight in e4m3 that make up for each other's rounding: `gptq.py`, on a grid that is not uniform.

A float's step doubles at each power of two, so it matters where in such an interval a row's weights lie. Scales within
one factor of two give all the grids there are, but for the few smallest codes; each row takes the one that leaves the
least error of the layer's output.

Shapes: N outputs, K inputs, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.fp8_linear.reference import FORMAT, LARGEST, Scheme, quantize_weight
from vit_efficient.quantization import gptq

CANDIDATES = 8
SWEEPS = 3
# Chosen on a part of 200 images, where it lowers the error on the others: compensation for the coarse steps of e4m3
# learns the images by heart sooner than that for integers.
DAMPING = 0.1


def nearest(x: Tensor) -> Tensor:
    """The e4m3 values, as float32, next to values that are within its range."""
    return x.clamp(-LARGEST, LARGEST).to(FORMAT).float()


def search_scale(weight_NK: Tensor, h_K: Tensor, scheme: Scheme) -> Tensor:
    """Of the candidates for each row, the scale with the least squared rounding error; (N, 1), or (1, 1).

    Args:
        weight_NK: float32.
        h_K: how much each input counts: its second moment.
        scheme: with one scale in all there is nothing to choose for each row, and all rows decide together.
    """
    scales_C = _candidates(weight_NK, scheme)
    errors_CN = torch.stack([((nearest(weight_NK / s) * s - weight_NK).square() * h_K).sum(dim=1) for s in scales_C])
    return _chosen(scales_C, _least(errors_CN, scheme)[: len(scales_C[0])])


def quantize(weight_NK: Tensor, h_KK: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes for a weight, and their scales.

    Args:
        weight_NK: float32.
        h_KK: second moments of the inputs, float32.
        scheme: where scales are.

    Returns:
        codes (N, K) as float32, and scales (N, 1), or (1, 1).
    """
    h_KK = gptq.damped(h_KK, DAMPING)
    rows, inputs = weight_NK.shape
    limit_NK = torch.full_like(weight_NK, LARGEST)
    limits = (-limit_NK, limit_NK)
    scales_C = _candidates(weight_NK, scheme)
    tried = [_rounded(weight_NK, h_KK, scale, limits) for scale in scales_C]
    errors_CN = torch.stack([gptq._errors(weight_NK, h_KK, c * s) for c, s in zip(tried, scales_C, strict=True)])
    chosen_N = _least(errors_CN, scheme)
    scale = _chosen(scales_C, chosen_N[: len(scales_C[0])])
    codes_NK = _chosen(tried, chosen_N)
    for _ in range(SWEEPS):
        if scheme.weights == "channel":
            scale = gptq._refit(weight_NK, h_KK, codes_NK, scale, inputs)
        codes_NK = gptq._descend(weight_NK, h_KK, codes_NK, scale.expand(rows, inputs), limits, nearest)
    return codes_NK, scale


def _rounded(weight_NK: Tensor, h_KK: Tensor, scale: Tensor, limits: gptq.Limits) -> Tensor:
    """Codes for given scales: of GPTQ, or to nearest for the rows that this serves better."""
    plain_NK = nearest(weight_NK / scale)
    other_NK = gptq._compensated(weight_NK, h_KK, scale.expand_as(weight_NK), limits, nearest)
    errors = [gptq._errors(weight_NK, h_KK, codes * scale) for codes in (plain_NK, other_NK)]
    return torch.where((errors[1] < errors[0]).unsqueeze(1), other_NK, plain_NK)


def _candidates(weight_NK: Tensor, scheme: Scheme) -> list[Tensor]:
    """Scales from that of the largest magnitude to twice it: none of them saturates."""
    _, scale = quantize_weight(weight_NK, scheme)
    return [scale * 2 ** (part / CANDIDATES) for part in range(CANDIDATES)]


def _least(errors_CN: Tensor, scheme: Scheme) -> Tensor:
    """Which candidate leaves the least error: for each row, or, with one scale in all, for all rows together; (N,)."""
    if scheme.weights == "channel":
        return errors_CN.argmin(dim=0)
    return errors_CN.sum(dim=1).argmin().expand(errors_CN.shape[1])


def _chosen(candidates: list[Tensor], chosen_N: Tensor) -> Tensor:
    """Each row (..., N, K) of the candidate that was chosen for it."""
    return torch.stack(candidates)[chosen_N, torch.arange(len(chosen_N), device=chosen_N.device)]
