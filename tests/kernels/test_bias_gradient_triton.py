"""Gradients with their sums against their definition. Shapes: B batch, T tokens, H heads, E head width."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels.bias_gradient import reference
from vit_efficient.kernels.bias_gradient import triton as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32,) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 7, 61) if INTERPRETED else (1, 7, 197, 5000)
WIDTHS = (3, 512, 700, 2100) if INTERPRETED else (3, 512, 700, 3072, 4096)


def near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Within 1e-5 of the largest; what is rounded to 16 bits within a unit of these."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.is_contiguous()
        most = max(1e-5, torch.finfo(one.dtype).eps if one.dtype != torch.float32 else 0)
        assert (one.float() - other.float()).abs().max() <= most * other.float().abs().max().clamp_min(1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_gelu(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    grad, x = torch.randn(rows, width).to(device, dtype), (torch.randn(rows, width) * 3).to(device, dtype)
    near(kernels.gelu_gradient(grad, x), reference.gelu_gradient(grad, x))


def test_gelu_of_strided_inputs_and_large_numbers(device: torch.device) -> None:
    grad, x = torch.randn(50, 40, device=device).t(), torch.randn(40, 90, device=device)[:, 20:70] * 40
    near(kernels.gelu_gradient(grad, x), reference.gelu_gradient(grad, x))


HEADS = [(1, 1, 1, 8), (3, 2, 65, 24), (2, 3, 70, 64)] + ([] if INTERPRETED else [(16, 16, 197, 64), (5, 3, 577, 80)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "fused", "one is other", "width is far"])
@pytest.mark.parametrize("shape", HEADS)
def test_heads(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> None:
    batch, heads, tokens, width = shape
    given = torch.randn(3, *shape).to(device, dtype)
    if layout in ("tokens first", "one is other"):
        given = given.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "fused":
        given = given.permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    elif layout == "width is far":
        given = given.transpose(3, 4).contiguous().transpose(3, 4)
    q, k, v = given.unbind(0)
    if layout == "one is other":
        k = k.contiguous()
    found, expected = kernels.heads_gradient(q, k, v), reference.heads_gradient(q, k, v)
    near(found, expected)
    assert torch.equal(found[0], expected[0])
    assert found[0].shape == (batch * tokens, 3 * heads * width)


@pytest.mark.parametrize("rows", [1, 63, 64, 5000])
@pytest.mark.parametrize("strips", [1, 3, 48, 10_000])
def test_shares_hold_all_rows_once(rows: int, strips: int, device: torch.device) -> None:
    shares, share = kernels._shares(rows, strips, 64, device)
    assert share % 64 == 0
    assert (shares - 1) * share < rows <= shares * share
