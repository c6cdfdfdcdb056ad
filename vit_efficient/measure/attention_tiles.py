"""Tiles of the attention kernels, measured on request and kept for later runs of this user."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from vit_efficient.kernels.timing import time_in_turn
from vit_efficient.kernels.tuning import Shape, Tile, chip_of, forced, keep
from vit_efficient.measure.attention_cases import Case, Work, operands, ours

# Worth trying: queries and keys a step, warps, steps in flight, programs a multiprocessor that registers are kept for.
TILES = tuple(
    Tile(block_m=m, block_n=n, block_k=64, warps=warps, stages=stages, programs=programs)
    for m, n, warps, stages, programs in (
        (64, 128, 4, 2, 3), (64, 128, 4, 3, 3), (64, 128, 4, 2, 1), (64, 64, 4, 3, 4), (64, 64, 4, 2, 1),
        (128, 128, 8, 2, 1), (128, 128, 8, 3, 1), (128, 64, 8, 3, 2), (128, 64, 4, 3, 2), (128, 128, 8, 2, 2),
    )
)  # fmt: skip


def tune_case(case: Case, device: torch.device) -> None:
    """Measure `TILES` with our forms at one shape, and keep the best of each kind for later runs of this user."""
    import triton
    from triton.runtime.errors import OutOfResources

    q, k, v = operands(case, device)
    works = ours(q, k, v, case.width**-0.5)
    kinds = {"int8": "int8 a block, float values"} | ({"fp8": "fp8, float values"} if len(works) > 5 else {})
    for kind, name in kinds.items():
        variants: dict[str, Work] = {}
        for index, tile in enumerate(TILES):
            work = partial(_with_tile, works[name], tile)
            try:
                work()
            except OutOfResources:  # more registers or shared memory than this GPU has
                continue
            variants[str(index)] = work
        found = time_in_turn(variants, device)
        best = min(found, key=lambda index: found[index].median)
        op = f"{kind}_attention_{64 if case.width <= 64 else 128}"
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        shape = Shape(case.tokens, case.width, case.width)
        keep(chip_of(device)[0], op, shape, TILES[int(best)], found[best].median, versions)
        for number in sorted(found, key=lambda number: found[number].median):
            words = " ".join(str(value) for value in asdict(TILES[int(number)]).values())
            print(f"{case!s:28} {op:20} {found[number].median:9.4f} ms  tile {words}", flush=True)


def _with_tile(work: Work, tile: Tile) -> Tensor:
    with forced(tile):
        return work()
