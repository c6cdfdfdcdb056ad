"""How kernels that hold whole rows are launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vit_efficient.kernels.overlap import processors

WIDEST = 2**16  # columns that one program can hold
ELEMENTS = 1024  # that a program works on at once, where rows are short: one warp, which sums without a barrier
WARP_ELEMENTS = 1024  # a warp's share of them


class RowLaunch(NamedTuple):
    """A grid of programs, each with `rows` rows of `block` columns."""

    programs: int
    rows: int
    block: int
    warps: int


def row_launch(rows: int, columns: int, device: torch.device) -> RowLaunch:
    """Several short rows a program, but no fewer than two programs a multiprocessor.

    Raises:
        ValueError: a row is wider than one program can hold.
    """
    if columns > WIDEST:
        raise ValueError(f"rows of {columns:,} columns do not fit one program of a kernel; {WIDEST:,} is the most.")
    block = 1 << max(4, (columns - 1).bit_length())
    together = max(1, ELEMENTS // block)
    while together > 1 and -(-rows // together) < 2 * processors(device, 1):
        together //= 2
    warps = min(16, max(1, block * together // WARP_ELEMENTS))
    return RowLaunch(-(-rows // together), together, block, warps)


def vector(x: Tensor | None) -> Tensor | None:
    """A number a column, neighbours in memory, or None."""
    return None if x is None else x.contiguous()


def with_rows(x: Tensor) -> Tensor:
    """A matrix whose columns are neighbours in memory; its rows may be any distance apart."""
    return x if x.stride(1) == 1 else x.contiguous()
