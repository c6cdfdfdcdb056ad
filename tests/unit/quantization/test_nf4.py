"""4-bit codes: bit for bit those of bitsandbytes, whose definition they are."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from vit_efficient.quantization import nf4


def as_bitsandbytes(weight: Tensor, type: Any = "nf4", double_quant: bool = True) -> None:
    ours_alone = type == "nf4" and weight.numel() % nf4.BLOCK == 0
    with pytest.MonkeyPatch.context() as patch:
        if ours_alone:
            patch.setattr(bnb.functional, "quantize_4bit", None)
        packed, state = nf4.quantize_4bit(weight, type, double_quant)
    wanted, its = bnb.functional.quantize_4bit(weight.float(), None, None, nf4.BLOCK, double_quant, type)
    assert torch.equal(packed, wanted)
    ours, theirs = state.as_dict(), its.as_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) if torch.is_tensor(value) else ours[key] == value, key
    assert torch.equal(
        bnb.functional.dequantize_4bit(packed, state).nan_to_num(),
        bnb.functional.dequantize_4bit(wanted, its).nan_to_num(),
    )


@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (5, 128), (3, 192), (7, 33), (1, 2), (1030, 1024)])
def test_random_weights(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, type: str) -> None:
    as_bitsandbytes((torch.randn(shape) * 0.02).to(dtype), type, double_quant)


@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-30, 1e-38, 1e-42, 1e30])
def test_borders_and_what_is_next_to_them(scale: float) -> None:
    code = bnb.functional.get_4bit_type("nf4", device=torch.device("cpu"))
    borders = (code[1:] + code[:-1]) / 2
    near = [borders, code]
    for towards in (-2.0, 2.0):
        step = borders
        for _ in range(3):
            step = torch.nextafter(step, torch.tensor(towards))
            near.append(step)
    cells = torch.arange(-16, 17) / 16
    near += [cells, torch.nextafter(cells, torch.tensor(-2.0)).clamp(-1), torch.tensor([0.0, -0.0, 1e-45, -1e-45])]
    x = torch.cat(near)
    weight = torch.zeros(-(-len(x) // 63), 64)
    weight[:, 0] = 1  # its block's largest
    rest = torch.zeros(weight.shape[0] * 63)
    rest[: len(x)] = x
    weight[:, 1:] = rest.view(-1, 63)
    as_bitsandbytes(weight * scale)
    as_bitsandbytes(-weight * scale)


def test_zeros_pieces_and_views() -> None:
    as_bitsandbytes(torch.zeros(4, 64))
    as_bitsandbytes(torch.randn(2 * nf4.PIECE + 5, nf4.BLOCK))
    as_bitsandbytes(torch.randn(128, 70).T)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_to_bitsandbytes(value: float) -> None:
    weight = torch.randn(8, 64)
    weight[3, 5] = value
    assert nf4._codes(weight) is None
    packed, _ = nf4.quantize_4bit(weight, "nf4", False)
    assert torch.equal(packed, bnb.functional.quantize_4bit(weight, None, None, 64, False, "nf4")[0])


def test_zeros_where_the_smallest_numbers_are_made_zero() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        packed, state = nf4.quantize_4bit(torch.zeros(2, 64), "nf4", False)
        assert bnb.functional.dequantize_4bit(packed, state).nan_to_num().count_nonzero() == 0
    finally:
        torch.set_flush_denormal(False)


def test_on_the_cpu_whatever_the_default_device() -> None:
    weight = torch.randn(4, 64)
    with torch.device("meta"):
        packed, state = nf4.quantize_4bit(weight, "nf4", False)
    assert torch.equal(packed, nf4.quantize_4bit(weight, "nf4", False)[0])
    assert state.absmax.device.type == "cpu"
