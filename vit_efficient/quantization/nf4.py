"""bitsandbytes' 4-bit quantization, with nf4 on a CPU bit for bit the same in a quarter of the time.

bitsandbytes searches the 15 borders between code values for each weight. Here a weight's place on an even grid says how
many borders lie before that cell, and one comparison whether it lies beyond the border in it; and a piece of weights
goes through all steps before the next, so that it stays in the cache. ViT-7B's layers, on two cores: 1.0 s for 8,192 x
4,096 weights becomes 0.23.
"""

from __future__ import annotations

from functools import cache

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

BLOCK = 64  # weights that share a scale
NESTED = 256  # scales that share a scale, where these are quantized too
PIECE = 2**14  # blocks that go through all steps at once
CELLS = 16  # of the grid, between 0 and 1


def quantize_4bit(weight: Tensor, type: str, double_quant: bool) -> tuple[Tensor, QuantState]:
    """Codes and scales of a weight (N, K), from float32.

    Returns:
        uint8 (N * K / 2, 1), two codes a byte, and what they stand for, as bitsandbytes has them.
    """
    found = None
    if type == "nf4" and weight.device.type == "cpu" and weight.numel() and weight.numel() % BLOCK == 0:
        found = _codes(weight.reshape(-1, BLOCK))
    if found is None:
        packed, state = bnb.functional.quantize_4bit(
            weight.to(torch.float32), None, None, BLOCK, double_quant, type
        )  # fmt: skip
        return packed, state
    packed, scales = found
    words = {"shape": weight.shape, "dtype": torch.float32, "blocksize": BLOCK, "quant_type": type}
    code = bnb.functional.get_4bit_type(type, device=weight.device)
    if not double_quant:
        return packed, QuantState(absmax=scales, code=code, **words)
    offset = scales.mean()
    nested, state = bnb.functional.quantize_blockwise(scales - offset, blocksize=NESTED)
    return packed, QuantState(absmax=nested, code=code, offset=offset, state2=state, **words)


@cache
def _grid() -> tuple[Tensor, Tensor]:
    """Of each cell from -1 to 1: how many borders lie in cells before it, float32, and the one in it, or infinity."""
    code = bnb.functional.get_4bit_type("nf4", device=torch.device("cpu"))
    borders = (code[1:] + code[:-1]) / 2
    cells = _cells(borders).long()
    assert cells.unique().numel() == cells.numel()
    before = (cells < torch.arange(2 * CELLS + 1, device="cpu").unsqueeze(1)).sum(1).to(torch.float32)
    inside = torch.full_like(before, float("inf"))
    inside[cells] = borders
    return before, inside


def _cells(x: Tensor) -> Tensor:
    """Cells of numbers from -1 to 1, int32: never a lower one for a larger number."""
    return ((x + 1) * CELLS).to(torch.int32)


def _codes(blocks: Tensor) -> tuple[Tensor, Tensor] | None:
    """Packed codes and scales of (blocks, BLOCK); None where one is not finite, which has no cell."""
    before, inside = _grid()
    packed = torch.empty((blocks.numel() // 2, 1), dtype=torch.uint8, device="cpu")
    scales = torch.empty(len(blocks), dtype=torch.float32, device="cpu")
    for start in range(0, len(blocks), PIECE):
        piece = blocks[start : start + PIECE].to(torch.float32)
        largest = piece.abs().amax(-1)
        inverse = 1.0 / largest.clamp(min=1e-38)
        if not (largest.isfinite() & inverse.isfinite()).all():  # the second where the smallest numbers are made 0
            return None
        x = (piece * inverse.unsqueeze(1)).clamp_(-1, 1).view(-1)
        cells = _cells(x)
        beyond = x > torch.index_select(inside, 0, cells)
        codes = torch.index_select(before, 0, cells).add_(beyond).to(torch.uint8)
        half = start * BLOCK // 2
        packed[half : half + len(codes) // 2, 0] = (codes[::2] << 4) | codes[1::2]
        scales[start : start + len(piece)] = largest
    return packed, scales
