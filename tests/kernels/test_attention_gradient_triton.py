"""The backward pass of attention against its definition. Shapes: B batch, H heads, T tokens, E head width."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels.attention_gradient import reference
from vit_efficient.kernels.attention_gradient import triton as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32,) if INTERPRETED else (torch.float16, torch.bfloat16)
TOKENS = (1, 5, 16, 17, 33, 63, 64, 65, 128, 130, 197, 208, 225, 256)


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, size: float = 1.0
) -> tuple[tuple[Tensor, ...], float]:
    """What the operator takes but for the scale, as a model has them, and the scale; `size` is that of queries."""
    batch, heads, tokens, width = shape
    packed = torch.randn(batch, tokens, 3, heads, width)
    packed[:, :, 0] *= size
    q, k, v = packed.to(device, dtype).permute(2, 0, 3, 1, 4).unbind(0)
    scale = width**-0.5
    s = scale * (q.float() @ k.float().mT)
    out = (s.softmax(-1) @ v.float()).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.randn(batch, tokens, heads, width).to(device, dtype).transpose(1, 2)
    return (grad, q, k, v, out, s.logsumexp(-1)), scale


def near(found: tuple[Tensor, Tensor], given: tuple[Tensor, ...], scale: float) -> None:
    """The gradients of queries, keys and values, each near the definition's by its norm; and their sums."""
    expected = reference.attention_gradient(*(x.float() for x in given), scale)
    dtype = given[1].dtype
    columns = given[1].shape[1] * given[1].shape[3]
    most = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.is_contiguous()
        one, other = (x.float().view(-1, 3, columns).transpose(0, 1) for x in (one, other))
        # Rounding of weights and of their gradients is of this size, also where what is summed cancels: the gradient
        # of keys sums to 0 over tokens, and with one token those of queries and keys are 0.
        floor = other.norm(dim=(1, 2)).max()
        assert one.isfinite().all()
        assert ((one - other).norm(dim=(1, 2)) <= most * floor.clamp_min(1e-30)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("tokens", TOKENS)
def test_ragged_lengths(tokens: int, first: bool, dtype: torch.dtype, device: torch.device) -> None:
    given, scale = operands((2, 3, tokens, 64), dtype, device)
    near(kernels.attention_gradient(*given, scale, first=first), given, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [70, 201])
@pytest.mark.parametrize("width", [8, 32, 48, 64])
def test_widths(width: int, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    given, scale = operands((2, 2, tokens, width), dtype, device)
    near(kernels.attention_gradient(*given, scale), given, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_m", [16, 32, 64])
@pytest.mark.parametrize("tokens", [99, 197])
def test_blocks(tokens: int, block_m: int, dtype: torch.dtype, device: torch.device) -> None:
    given, scale = operands((2, 2, tokens, 32), dtype, device)
    near(kernels.attention_gradient(*given, scale, block_m=block_m), given, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("tokens", [5, 17, 50, 65, 100, 128, 129, 160, 197, 201, 225, 256])
def test_a_batch_that_fills_the_chip(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Programs that share a multiprocessor, one after another: each to itself, and every time the same."""
    given, scale = operands((64, 16, tokens, width), dtype, torch.device("cuda"))
    made, sums = kernels.attention_gradient(*given, scale)
    for image in range(0, 64, 4):
        one = tuple(x[image : image + 4] for x in given)
        wanted = reference.attention_gradient(*(x.float() for x in one), scale)[0]
        found = made.view(64, tokens, -1)[image : image + 4].float().view_as(wanted)
        assert (found - wanted).norm() <= 2 * torch.finfo(dtype).eps * wanted.norm()
    for _ in range(8):
        again, sums_again = kernels.attention_gradient(*given, scale)
        assert torch.equal(again, made)
        assert torch.equal(sums_again, sums)


@pytest.mark.parametrize("layout", ["heads first", "one is other", "width is far", "lse with a width"])
def test_layouts(layout: str, device: torch.device) -> None:
    given, scale = operands((2, 3, 37, 32), DTYPES[0], device)
    grad, q, k, v, out, lse = given
    if layout == "heads first":
        given = tuple(x.contiguous() for x in given)
    elif layout == "one is other":
        given = grad.contiguous(), q, k.contiguous(), v, out, lse
    elif layout == "width is far":
        given = *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in given[:5]), lse.mT.contiguous().mT
    else:
        given = grad, q, k, v, out, lse.unsqueeze(-1)
    near(kernels.attention_gradient(*given, scale), given, scale)


@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_small_and_large_logits(size: float, device: torch.device) -> None:
    given, scale = operands((2, 2, 70, 64), torch.float32 if INTERPRETED else torch.bfloat16, device, size)
    near(kernels.attention_gradient(*given, scale), given, scale)


def test_equal_inputs_give_equal_gradients(device: torch.device) -> None:
    given, scale = operands((3, 2, 130, 64), DTYPES[-1], device)
    one, other = (kernels.attention_gradient(*given, scale) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_a_head_that_is_not_a_number_stays_alone(device: torch.device) -> None:
    given, scale = operands((2, 2, 70, 32), DTYPES[0], device)
    given[1][1, 0, 3] = float("nan")
    given[5][1, 0, 3] = float("nan")
    made, _ = kernels.attention_gradient(*given, scale)
    made = made.view(2, 70, 3, 2, 32)
    assert made[0].isfinite().all()
    assert made[1, :, :, 1].isfinite().all()
    assert made[1, :, 1:, 0].isnan().all()
