"""Weight codes that make up for each other's rounding, on the activations that were seen.

The error counted is that of the layer's output, ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` with H the second moments of its inputs.
Three steps, each of which can only lower it or leave it (but for the damping of H):

- GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after another, the one with the largest second
  moment first, and the columns that are left take over the error.
- Scales for fixed codes: least squares, a small system of equations for each row.
- Codes for fixed scales: each column in turn is set to its best code, given all others.

Shapes: N outputs, K inputs, G groups of `group` inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DAMPING = 0.01
SWEEPS = 2
BLOCK = 128


def search_scales(weight_NK: Tensor, h_K: Tensor, group: int, largest: int) -> Tensor:
    """Scales (N, G) with the least squared rounding error, each input counted by its second moment `h_K`."""
    grouped, h = _grouped(weight_NK, group), _grouped(h_K.unsqueeze(0), group)
    full = (grouped.abs().amax(dim=-1) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    best, least = full.clone(), torch.full_like(full, torch.inf)
    for part in torch.linspace(0.4 if largest < 127 else 0.8, 1, 25).tolist():
        scale = full * part
        steps = scale.unsqueeze(-1)
        error = (((grouped / steps).round().clamp(-largest, largest) * steps - grouped).square() * h).sum(dim=-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def quantize(weight_NK: Tensor, h_KK: Tensor, group: int | None, largest: int) -> tuple[Tensor, Tensor]:
    """Codes and scales for a weight.

    Args:
        weight_NK: float32.
        h_KK: second moments of the inputs, float32.
        group: inputs that share a scale; None: the whole row.
        largest: the largest code.

    Returns:
        codes (N, K) as float32, and scales (N, G) float32.
    """
    inputs = weight_NK.shape[1]
    group = inputs if group is None else group
    h_KK = h_KK.clone()
    mean = h_KK.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    h_KK.diagonal().add_(DAMPING * mean)  # also for inputs that were always zero
    scale_NG = search_scales(weight_NK, h_KK.diagonal(), group, largest)
    codes_NK = _compensated(weight_NK, h_KK, _spread(scale_NG, group, inputs), largest)
    for _ in range(SWEEPS):
        scale_NG = _refit(weight_NK, h_KK, codes_NK, scale_NG, group)
        codes_NK = _descend(weight_NK, h_KK, codes_NK, _spread(scale_NG, group, inputs), largest)
    return codes_NK, scale_NG


def output_error(weight_NK: Tensor, h_KK: Tensor, codes_NK: Tensor, scale_NG: Tensor, group: int | None) -> float:
    """The error of the output that is minimised, summed over outputs, for one input of average size."""
    inputs = weight_NK.shape[1]
    left_NK = weight_NK - codes_NK * _spread(scale_NG, inputs if group is None else group, inputs)
    return float(((left_NK @ h_KK) * left_NK).sum())


def _grouped(x_NK: Tensor, group: int) -> Tensor:
    """(N, G, group); the last group is filled up with zeros."""
    missing = -x_NK.shape[1] % group
    return F.pad(x_NK, (0, missing)).unflatten(1, (-1, group))


def _spread(scale_NG: Tensor, group: int, inputs: int) -> Tensor:
    return scale_NG.repeat_interleave(group, dim=1)[:, :inputs]


def _compensated(weight_NK: Tensor, h_KK: Tensor, scale_NK: Tensor, largest: int) -> Tensor:
    """GPTQ. The updates of columns beyond a block of them are applied a block at a time."""
    inputs = weight_NK.shape[1]
    order = h_KK.diagonal().argsort(descending=True, stable=True)
    left_NK, scale_NK = weight_NK[:, order].clone(), scale_NK[:, order]
    lower = torch.linalg.cholesky(h_KK[order][:, order].double())
    upper_KK = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    codes_NK = torch.zeros_like(left_NK)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = torch.zeros_like(left_NK[:, start:end])
        for k in range(start, end):
            codes_NK[:, k] = (left_NK[:, k] / scale_NK[:, k]).round().clamp(-largest, largest)
            error_N = (left_NK[:, k] - codes_NK[:, k] * scale_NK[:, k]) / upper_KK[k, k]
            left_NK[:, k:end] -= error_N.unsqueeze(1) * upper_KK[k, k:end]
            errors[:, k - start] = error_N
        left_NK[:, end:] -= errors @ upper_KK[start:end, end:]
    return codes_NK[:, order.argsort()]


def _refit(weight_NK: Tensor, h_KK: Tensor, codes_NK: Tensor, scale_NG: Tensor, group: int) -> Tensor:
    """Least-squares scales for given codes; a scale that would leave the neighbourhood of the old one is kept."""
    grouped = _grouped(codes_NK, group)  # N G g
    towards_NG = (_grouped(weight_NK @ h_KK, group) * grouped).sum(dim=-1)
    groups = grouped.shape[1]
    normal_NGG = torch.empty(*towards_NG.shape, groups, device=weight_NK.device)
    for j in range(groups):
        rows = slice(j * group, min((j + 1) * group, codes_NK.shape[1]))
        normal_NGG[:, j] = (_grouped(codes_NK[:, rows] @ h_KK[rows], group) * grouped).sum(dim=-1)
    diagonal = normal_NGG.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
    new_NG = torch.linalg.solve(normal_NGG.double(), towards_NG.double()).float()
    near = (new_NG > 0.5 * scale_NG) & (new_NG < 2 * scale_NG)
    return torch.where(near, new_NG, scale_NG)


def _descend(weight_NK: Tensor, h_KK: Tensor, codes_NK: Tensor, scale_NK: Tensor, largest: int) -> Tensor:
    """One sweep of coordinate descent over the columns."""
    codes_NK = codes_NK.clone()
    slope_NK = (weight_NK - codes_NK * scale_NK) @ h_KK
    for k in range(weight_NK.shape[1]):
        step_N = slope_NK[:, k] / h_KK[k, k]
        new_N = (codes_NK[:, k] + step_N / scale_NK[:, k]).round().clamp(-largest, largest)
        moved_N = (new_N - codes_NK[:, k]) * scale_NK[:, k]
        codes_NK[:, k] = new_N
        slope_NK -= moved_N.unsqueeze(1) * h_KK[k]
    return codes_NK
