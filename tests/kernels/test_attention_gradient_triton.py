"""The backward pass of attention against its definition. Shapes: B batch, H heads, T tokens, E head width."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels.attention_gradient import reference
from vit_efficient.kernels.attention_gradient import triton as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32,) if INTERPRETED else (torch.float16, torch.bfloat16)
VARIANTS = ("scratch", "two")
TOKENS = (
    (1, 5, 16, 17, 63, 64, 65, 130, 197, 208) if INTERPRETED else (1, 5, 16, 17, 63, 64, 65, 130, 197, 208, 256, 577)
)


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
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_ragged_lengths(tokens: int, variant: Any, dtype: torch.dtype, device: torch.device) -> None:
    given, scale = operands((2, 3, tokens, 64), dtype, device)
    near(kernels.attention_gradient(*given, scale, variant=variant), given, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("width", [8, 32, 48, 64, 128])
def test_widths(width: int, variant: Any, dtype: torch.dtype, device: torch.device) -> None:
    given, scale = operands((2, 2, 70, width), dtype, device)
    near(kernels.attention_gradient(*given, scale, variant=variant, block_m=32, block_n=64), given, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("blocks", [(16, 16), (16, 32), (64, 16), (64, 64), (128, 128), (32, 256)])
def test_blocks(blocks: tuple[int, int], variant: Any, dtype: torch.dtype, device: torch.device) -> None:
    given, scale = operands((2, 2, 99, 32), dtype, device)
    found = kernels.attention_gradient(*given, scale, variant=variant, block_m=blocks[0], block_n=blocks[1])
    near(found, given, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"tail": False}, {"ahead": True}, {"together": False}, {"split": True}, {"split": True, "tail": False}],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("blocks", [(64, 64), (32, 128)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_narrow_last_blocks(
    tokens: int,
    variant: Any,
    blocks: tuple[int, int],
    options: dict[str, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if "split" in options and variant == "scratch":
        pytest.skip("one program a head")
    given, scale = operands((2, 1, tokens, 64), dtype, device)
    m, n = blocks
    near(kernels.attention_gradient(*given, scale, variant=variant, block_m=m, block_n=n, **options), given, scale)


@pytest.mark.parametrize(
    ("tokens", "block", "expected"),
    [
        (197, 64, (3, 16, False)),
        (197, 128, (1, 80, False)),
        (197, 256, (0, 256, False)),
        (208, 64, (3, 16, True)),
        (128, 64, (2, 0, True)),
        (99, 32, (3, 16, False)),
        (1, 16, (0, 16, False)),
    ],
)
def test_blocks_of_a_length(tokens: int, block: int, expected: tuple[int, int, bool]) -> None:
    assert kernels._blocks(tokens, block, True) == expected
    assert kernels._blocks(tokens, block, False)[1] in (0, block)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["heads first", "one is other", "width is far", "lse with a width"])
def test_layouts(layout: str, variant: Any, device: torch.device) -> None:
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
    near(kernels.attention_gradient(*given, scale, variant=variant, block_n=32), given, scale)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_small_and_large_logits(size: float, variant: Any, device: torch.device) -> None:
    given, scale = operands((2, 2, 70, 64), torch.float32 if INTERPRETED else torch.bfloat16, device, size)
    near(kernels.attention_gradient(*given, scale, variant=variant, block_n=64), given, scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_inputs_give_equal_gradients(variant: Any, device: torch.device) -> None:
    given, scale = operands((3, 2, 130, 64), DTYPES[-1], device)
    one, other = (kernels.attention_gradient(*given, scale, variant=variant) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_head_that_is_not_a_number_stays_alone(variant: Any, device: torch.device) -> None:
    given, scale = operands((2, 2, 70, 32), DTYPES[0], device)
    given[1][1, 0, 3] = float("nan")
    given[5][1, 0, 3] = float("nan")
    made, _ = kernels.attention_gradient(*given, scale, variant=variant, block_n=64)
    made = made.view(2, 70, 3, 2, 32)
    assert made[0].isfinite().all()
    assert made[1, :, :, 1].isfinite().all()
    assert made[1, :, 1:, 0].isnan().all()
