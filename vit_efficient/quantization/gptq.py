"""Weight codes that make up for each other's rounding, on the activations that were seen.

The error counted is that of the layer's output, ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` with H the second moments of its inputs.
Three steps, each of which can only lower it or leave it (but for the damping of H):

- GPTQ (Frantar et al., arXiv:2210.17323): columns are rounded one after another, the one with the largest second
  moment first, and the columns that are left take over the error. Rows that rounding to nearest serves better keep it.
- Scales for fixed codes: least squares, a small system of equations for each row.
- Codes for fixed scales: each column in turn is set to its best code, given all others.

Shapes: N outputs, K inputs, G groups of `group` inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vit_efficient.kernels.int8_linear.reference import SMALLEST_SCALE, grouped, in_16_bits, weight_range
from vit_efficient.kernels.int8_linear.scheme import Scheme

Limits = tuple[Tensor, Tensor]
Nearest = Callable[[Tensor], Tensor]  # of values in units of the scale: the codes that stand nearest
DAMPING = 0.01
SWEEPS = 2
BLOCK = 128


@dataclass(frozen=True)
class Grid:
    """What codes a weight may have: scales (N, G), and zero points (N, G) or None for symmetric codes."""

    scale: Tensor
    zero: Tensor | None
    largest: int

    def limits(self, group: int, inputs: int) -> tuple[Tensor, Tensor]:
        """The least and the largest code of each weight, both (N, K)."""
        if self.zero is None:
            largest_NK = torch.full_like(self.scale[:, :1], self.largest).expand(-1, inputs)
            return -largest_NK, largest_NK
        zero_NK = _spread(self.zero, group, inputs)
        return -zero_NK, 15 - zero_NK


def search_grid(weight_NK: Tensor, h_K: Tensor, scheme: Scheme) -> Grid:
    """The grid with the least squared rounding error, each input counted by its second moment `h_K`.

    Tries parts of the full range, narrowed alike from both of its ends.
    """
    parts, h = grouped(weight_NK, scheme.group), grouped(h_K.unsqueeze(0), scheme.group)
    largest = scheme.largest_weight
    if scheme.zero_point:
        full, _ = weight_range(weight_NK, scheme)
    else:
        full = (parts.abs().amax(dim=-1) / largest).clamp_min(SMALLEST_SCALE)
    least, scale_NG, zero_NG = torch.full_like(full, torch.inf), full.clone(), torch.zeros_like(full)
    # From the whole range down: where no input was ever seen every part is as good, and the whole one stays.
    for part in reversed(torch.linspace(0.4 if largest < 127 else 0.8, 1, 25).tolist()):
        scale = full * part
        scale = scale if scheme.group is None else in_16_bits(scale)
        steps = scale.unsqueeze(-1)
        zeros = _zeros(parts, scale, part) if scheme.zero_point else torch.zeros_like(scale)
        low = -zeros.unsqueeze(-1) if scheme.zero_point else torch.full_like(steps, -largest)
        high = 15 + low if scheme.zero_point else -low
        error = (((parts / steps).round().clamp(low, high) * steps - parts).square() * h).sum(dim=-1)
        better = error < least
        least, scale_NG = torch.where(better, error, least), torch.where(better, scale, scale_NG)
        zero_NG = torch.where(better, zeros, zero_NG)
    return Grid(scale_NG, zero_NG if scheme.zero_point else None, largest)


def _zeros(parts_NGg: Tensor, scale_NG: Tensor, part: float) -> Tensor:
    """Zero points of a range that is narrowed to `part` of the full one."""
    low = parts_NGg.amin(dim=-1).clamp_max(0) * part
    return (-low / scale_NG).round().clamp(0, 15)


def quantize(weight_NK: Tensor, h_KK: Tensor, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Codes for a weight, and their grid.

    Args:
        weight_NK: float32.
        h_KK: second moments of the inputs, float32.
        scheme: bits, groups, zero points.

    Returns:
        codes (N, K) as float32, and the grid.
    """
    inputs = weight_NK.shape[1]
    group = inputs if scheme.group is None else scheme.group
    h_KK = damped(h_KK)
    grid = search_grid(weight_NK, h_KK.diagonal(), scheme)
    scale_NG, limits = grid.scale, grid.limits(group, inputs)
    scale_NK = _spread(scale_NG, group, inputs)
    nearest_NK = (weight_NK / scale_NK).round().clamp(*limits)
    compensated_NK = _compensated(weight_NK, h_KK, scale_NK, limits)
    better_N = _errors(weight_NK, h_KK, compensated_NK * scale_NK) < _errors(weight_NK, h_KK, nearest_NK * scale_NK)
    codes_NK = torch.where(better_N.unsqueeze(1), compensated_NK, nearest_NK)
    for _ in range(SWEEPS):
        scale_NG = _refit(weight_NK, h_KK, codes_NK, scale_NG, group, short=scheme.group is not None)
        codes_NK = _descend(weight_NK, h_KK, codes_NK, _spread(scale_NG, group, inputs), limits)
    return codes_NK, replace(grid, scale=scale_NG)


def damped(h_KK: Tensor, share: float = DAMPING) -> Tensor:
    """Second moments of mean size 1, and `share` more on the diagonal, where inputs were always zero too."""
    mean = h_KK.diagonal().mean()
    h_KK = h_KK / torch.where(mean > 0, mean, 1)  # its size does not matter, and could underflow
    h_KK.diagonal().add_(share)
    return h_KK


def _errors(weight_NK: Tensor, h_KK: Tensor, rounded_NK: Tensor) -> Tensor:
    """Of each output, (N,)."""
    change_NK = weight_NK - rounded_NK
    return ((change_NK @ h_KK) * change_NK).sum(dim=1)


def _spread(scale_NG: Tensor, group: int, inputs: int) -> Tensor:
    return scale_NG.repeat_interleave(group, dim=1)[:, :inputs]


def _compensated(
    weight_NK: Tensor, h_KK: Tensor, scale_NK: Tensor, limits: Limits, nearest: Nearest = torch.round
) -> Tensor:
    """GPTQ. The updates of columns beyond a block of them are applied a block at a time."""
    inputs = weight_NK.shape[1]
    order = h_KK.diagonal().argsort(descending=True, stable=True)
    left_NK, scale_NK = weight_NK[:, order].clone(), scale_NK[:, order]
    low_NK, high_NK = (limit[:, order] for limit in limits)
    lower = torch.linalg.cholesky(h_KK[order][:, order].double())
    upper_KK = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    codes_NK = torch.zeros_like(left_NK)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors = torch.zeros_like(left_NK[:, start:end])
        for k in range(start, end):
            codes_NK[:, k] = nearest((left_NK[:, k] / scale_NK[:, k]).clamp(low_NK[:, k], high_NK[:, k]))
            error_N = (left_NK[:, k] - codes_NK[:, k] * scale_NK[:, k]) / upper_KK[k, k]
            left_NK[:, k:end] -= error_N.unsqueeze(1) * upper_KK[k, k:end]
            errors[:, k - start] = error_N
        left_NK[:, end:] -= errors @ upper_KK[start:end, end:]
    return codes_NK[:, order.argsort()]


def _refit(
    weight_NK: Tensor, h_KK: Tensor, codes_NK: Tensor, scale_NG: Tensor, group: int, *, short: bool = False
) -> Tensor:
    """Least-squares scales for given codes; a scale that would leave the neighbourhood of the old one is kept."""
    parts_NGg = grouped(codes_NK, group)
    towards_NG = (grouped(weight_NK @ h_KK, group) * parts_NGg).sum(dim=-1)
    groups = parts_NGg.shape[1]
    normal_NGG = torch.empty(*towards_NG.shape, groups, device=weight_NK.device)
    for j in range(groups):
        rows = slice(j * group, min((j + 1) * group, codes_NK.shape[1]))
        normal_NGG[:, j] = (grouped(codes_NK[:, rows] @ h_KK[rows], group) * parts_NGg).sum(dim=-1)
    diagonal = normal_NGG.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
    new_NG = torch.linalg.solve(normal_NGG.double(), towards_NG.double()).float()
    near = (new_NG > 0.5 * scale_NG) & (new_NG < 2 * scale_NG)
    new_NG = torch.where(near, in_16_bits(new_NG) if short else new_NG, scale_NG)
    # Where some were kept, or all were rounded to 16 bits, the new ones need not be better.
    before_N, after_N = (
        _errors(weight_NK, h_KK, codes_NK * _spread(scale, group, codes_NK.shape[1])) for scale in (scale_NG, new_NG)
    )
    return torch.where((after_N < before_N).unsqueeze(1), new_NG, scale_NG)


def _descend(
    weight_NK: Tensor,
    h_KK: Tensor,
    codes_NK: Tensor,
    scale_NK: Tensor,
    limits: Limits,
    nearest: Nearest = torch.round,
) -> Tensor:
    """One sweep of coordinate descent over the columns."""
    codes_NK, (low_NK, high_NK) = codes_NK.clone(), limits
    slope_NK = (weight_NK - codes_NK * scale_NK) @ h_KK
    for k in range(weight_NK.shape[1]):
        step_N = slope_NK[:, k] / h_KK[k, k]
        new_N = nearest((codes_NK[:, k] + step_N / scale_NK[:, k]).clamp(low_NK[:, k], high_NK[:, k]))
        moved_N = (new_N - codes_NK[:, k]) * scale_NK[:, k]
        codes_NK[:, k] = new_N
        slope_NK -= moved_N.unsqueeze(1) * h_KK[k]
    return codes_NK
