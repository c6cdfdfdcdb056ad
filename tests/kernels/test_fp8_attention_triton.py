"""The fp8 attention kernels against their definition. Shapes: B batch, H heads, N tokens, E head width.

Triton's interpreter truncates small e4m3 numbers and loses the carry of some others, so there every operand is one that
e4m3 holds exactly; on a GPU they are random.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels import attention_values
from vit_efficient.kernels.fp8_attention import reference
from vit_efficient.kernels.fp8_attention import triton as kernels
from vit_efficient.kernels.int8_attention import reference as int8
from vit_efficient.kernels.int8_attention import triton as int8_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS = (1, 63, 196, 197, 198, 256, 257, 577)


@pytest.fixture(autouse=True)
def _capable(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8 matrix units (sm_89)")


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    given = {"scale": 0.125, "rotated": True, "values": "float", "out_scale": None, "dtype": v.dtype} | options
    return kernels.attend(q, k, v, *given.values()).transpose(1, 2)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def exact(tokens: int, width: int, device: torch.device, heads: int = 2) -> Tensor:
    """(1, H, N, E): powers of two whose codes have no rounding: the largest of each token and each block is 448."""
    powers = torch.randint(-4, 1, (1, heads, tokens, width))
    signs = torch.randint(0, 2, powers.shape) * 2 - 1
    powers[..., 0] = 0
    sizes = (torch.arange(tokens) // attention_values.BLOCK + 1.0)[:, None]
    return (448 * signs * 2.0**powers * 2.0**-9 * sizes).to(device)


@pytest.mark.parametrize("tokens", TOKENS)
def test_exact_operands(tokens: int, device: torch.device) -> None:
    q, k = (exact(tokens, 64, device, heads=1) for _ in range(2))
    v = torch.randn(q.shape).to(device)
    found = attend(q, k, v, rotated=False)
    # Hopper's units keep about 14 bits of a sum of e4m3 products.
    assert error(found, reference.attend(q, k, v, scale=0.125, rotated=False)) < (1e-5 if INTERPRETED else 1e-3)


@pytest.mark.parametrize("width", [64, 80])
def test_rotated_operands(width: int, device: torch.device) -> None:
    """One channel a token: rotated, all are equally large, and their codes are exact."""
    tokens = 150
    q, k = torch.zeros(1, 2, tokens, width), torch.zeros(1, 2, tokens, width)
    for x in (q, k):
        channel = torch.randint(0, width, (1, 2, tokens, 1))
        size = 2.0 ** torch.randint(-3, 1, (1, 2, tokens, 1))
        x.scatter_(-1, channel, 448 / 128 * size)
    v = torch.randn(1, 2, tokens, width).to(device)
    q, k = q.to(device), k.to(device)
    found = attend(q, k, v)
    assert error(found, reference.attend(q, k, v, scale=0.125)) < 1e-5
    assert error(found, attend(q, k, v, rotated=False)) < 1e-5  # the rotation changes no product


@pytest.mark.parametrize("tokens", [1, 63, 197, 257])
def test_e4m3_values(tokens: int, device: torch.device) -> None:
    """All weights equal and so exact: the output is the mean of the values, whose blocks differ in scale."""
    v = exact(tokens, 64, device)
    q = torch.zeros_like(v)
    expected = v.double().mean(2, keepdim=True).expand_as(v)
    assert error(attend(q, v, v, values="fp8"), expected) < 1e-6
    found = int8_kernels.attend(q, v, v, None, None, None, 0.125, "fp8", "block", None, v.dtype).transpose(1, 2)
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("values", ["float", "fp8"])
def test_random_operands(rotated: bool, values: str, device: torch.device) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    for tokens in (197,) if INTERPRETED else (*TOKENS, 1024):
        qkv = torch.randn(1, tokens, 3, 3, 80)
        q, k, v = qkv.to(device, dtype).permute(2, 0, 3, 1, 4).unbind(0)
        expected = reference.attend(q, k, v, scale=0.125, rotated=rotated, values=values)  # type: ignore[arg-type]
        bound = 0.2 if INTERPRETED else 5e-2 if values == "fp8" else 1.5e-2
        assert error(attend(q, k, v, rotated=rotated, values=values), expected) < bound


@pytest.mark.gpu
def test_output_codes(device: torch.device) -> None:
    q, k, v = torch.randn(3, 1, 3, 197, 64, device=device, dtype=torch.bfloat16).unbind(0)
    out_scale = torch.tensor(0.01, device=device)
    found = attend(q, k, v, out_scale=out_scale)
    assert found.dtype == torch.float8_e4m3fn
    assert error(found.float(), reference.attend(q, k, v, scale=0.125, out_scale=out_scale).float()) < 4e-2


@pytest.mark.gpu
@pytest.mark.parametrize("values", ["float", "fp8"])
def test_int8_keys_with_e4m3_values(values: str, device: torch.device) -> None:
    for tokens in TOKENS:
        q, k, v = torch.randn(3, 2, 3, tokens, 64, device=device, dtype=torch.bfloat16).unbind(0)
        found = int8_kernels.attend(q, k, v, None, None, None, 0.125, values, "token", None, v.dtype).transpose(1, 2)
        expected = int8.attend(q, k, v, scale=0.125, values=values)  # type: ignore[arg-type]
        assert error(found, expected) < (5e-2 if values == "fp8" else 8e-3)
