"""The int8 attention kernels against their definition. Shapes: B batch, H heads, N tokens, E head width.

Errors are relative, and logits are small in one test, because a mean squared error does not see padded keys that are
counted. Memory that kernels are to fill holds NaN (or 99) before, so that what they leave out is seen.
"""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels import attention_launch
from vit_efficient.kernels.int8_attention import reference
from vit_efficient.kernels.int8_attention import triton as kernels
from vit_efficient.kernels.tuning import Tile, forced

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS = (1, 63, 196, 197, 198, 256, 257, 577)
DTYPES = (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
# Weights and values are rounded to the dtype before they are multiplied, and outputs after.
ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SMALL_TILE = Tile(block_m=16, block_n=32, block_k=64, warps=4, stages=2)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated without a value holds one that shows."""
    make = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        return x.fill_(math.nan if x.dtype.is_floating_point and x.element_size() > 1 else 99)

    monkeypatch.setattr(torch, "empty", poisoned)


def operands(
    tokens: int,
    heads: int = 3,
    width: int = 64,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
    batch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one packed projection (B, N, 3, H, E): not contiguous. Tokens differ in size, so that scales do."""
    qkv = torch.randn(batch, tokens, 3, heads, width)
    qkv *= size * torch.logspace(-0.5, 0.5, tokens)[:, None, None, None]
    q, k, v = qkv.to(dtype).to(device).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor | None, **options: Any) -> Tensor:
    given = {"scale": q.shape[-1] ** -0.5, "values": "int8", "keys": "token", "out_scale": None, "dtype": v.dtype}
    given |= options
    return kernels.attend(q, k, v, *(scales or (None,) * 3), *given.values()).transpose(1, 2)


def expect(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor | None, **options: Any) -> Tensor:
    return reference.attend(q, k, v, *(scales or (None,) * 3), **{"scale": q.shape[-1] ** -0.5, **options})


def error(found: Tensor, expected: Tensor) -> float:
    """Largest over heads and images, each relative to its norm."""
    return float(((found.double() - expected.double()).norm(dim=(-2, -1)) / expected.double().norm(dim=(-2, -1))).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [("int8", "token"), ("float", "block"), ("float", "token")])
@pytest.mark.parametrize("tokens", TOKENS)
def test_outputs_are_those_of_the_definition(
    tokens: int, form: tuple[str, str], dtype: torch.dtype, device: torch.device
) -> None:
    if INTERPRETED and tokens == 577 and form != ("float", "block"):
        pytest.skip("slow in the interpreter, and the same code")
    x = operands(tokens, heads=1 if INTERPRETED else 3, device=device, dtype=dtype)
    options = dict(zip(("values", "keys"), form, strict=True))
    found = attend(*x, **options)
    assert found.dtype == dtype
    assert found.shape == x[0].shape
    assert error(found, expect(*x, **options)) < ERROR[dtype]


@pytest.mark.parametrize("width", [16, 32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("values", ["int8", "float"])
def test_head_widths(width: int, values: str, device: torch.device) -> None:
    for dtype in DTYPES:
        x = operands(70, heads=2, width=width, device=device, dtype=dtype)
        assert error(attend(*x, values=values), expect(*x, values=values)) < ERROR[dtype]


@pytest.mark.parametrize("width", [27, 65])
def test_odd_widths_and_heads_and_images(width: int, device: torch.device) -> None:
    x = operands(65, heads=5, width=width, device=device, batch=2)
    assert error(attend(*x), expect(*x)) < ERROR[torch.float32]


@pytest.mark.parametrize("tokens", [1, 63, 197, 198, 257])
def test_small_logits_count_no_key_that_is_not_there(tokens: int, device: torch.device) -> None:
    """With logits near 0 each key weighs 1 / N: padding at 0 that is counted would take a visible share."""
    q, k, _ = operands(tokens, heads=1, device=device, size=1e-3)
    v = torch.ones_like(q)
    for keys in ("token", "block"):
        assert (attend(q, k, v, keys=keys) - 1).abs().max() < 1e-5
    zeros = torch.zeros_like(q)
    assert (attend(zeros, k, v) - 1).abs().max() < 1e-5  # scales at their smallest: products with them underflow


def test_large_logits(device: torch.device) -> None:
    q, k, v = operands(197, heads=1, device=device, size=30.0)
    assert error(attend(q, k, v), expect(q, k, v)) < 1e-4  # exponents of several hundred in float32


@pytest.mark.parametrize("tokens", [1, 197])
def test_calibrated_scales_saturate(tokens: int, device: torch.device) -> None:
    x = operands(tokens, heads=2, device=device)
    scales = [0.5 * one.abs().amax() / 127 for one in x]
    assert all((one.abs() > 127.5 * scale).any() for one, scale in zip(x, scales, strict=True))
    assert error(attend(*x, *scales), expect(*x, *scales)) < ERROR[torch.float32]


def test_codes_in_place_of_operands(device: torch.device) -> None:
    """As a projection's kernel puts them out: strided codes, with scales a token and head or one in all."""
    x = operands(197, heads=2, device=device)
    codes = [reference.quantize(one) for one in x]
    packed = torch.stack([c for c, _ in codes], 2).permute(2, 0, 1, 3, 4).contiguous()
    q, k, v = packed.unbind(0)
    scales = [s for _, s in codes]
    assert error(attend(q, k, v, *scales, dtype=torch.float32), expect(*x)) < ERROR[torch.float32]
    one = [torch.tensor(0.02, device=device) for _ in range(3)]
    q, k, _ = (reference.quantize(x, scale=s)[0] for x, s in zip(x, one, strict=True))
    found = attend(q, k, x[2], *one[:2], None, values="float")
    assert error(found, expect(q, k, x[2], *one[:2], None, values="float")) < ERROR[torch.float32]


def test_output_codes(device: torch.device) -> None:
    x = operands(197, heads=3, device=device)
    out_scale = torch.tensor(0.01, device=device)
    found, expected = attend(*x, out_scale=out_scale), expect(*x, out_scale=out_scale)
    assert found.dtype == torch.int8
    assert expected.abs().max() == 127  # saturates
    assert (found != expected).float().mean() < 1e-3  # on a rounding's edge
    assert (found.int() - expected.int()).abs().max() <= 1


def test_what_is_not_finite_is_seen(device: torch.device) -> None:
    clean = operands(197, heads=2, device=device)
    for operand in range(3):
        for bad in (math.nan, math.inf):
            x = [one.clone() for one in clean]
            x[operand][0, 1, 196, 3] = bad
            found, expected = attend(*x), expect(*x)
            assert torch.equal(found.isnan().any(-1), expected.isnan().any(-1))
            assert found[0, 0].isfinite().all()
    scales = [one.abs().amax() / 127 for one in clean]
    x = [one.clone() for one in clean]
    x[1][0, 1, 130, 3] = math.nan
    assert attend(*x, *scales)[0, 1].isnan().all()


@pytest.mark.parametrize("tokens", [31, 32, 48, 49, 65, 97])
def test_every_way_to_cut_the_keys(tokens: int, device: torch.device) -> None:
    """With and without whole blocks, a half, and a masked step of each width."""
    x = operands(tokens, heads=1, device=device)
    with forced(SMALL_TILE):
        for keys in ("token", "block"):
            assert error(attend(*x, keys=keys), expect(*x, keys=keys)) < ERROR[torch.float32]


def test_other_keys_than_queries_and_wider_values(device: torch.device) -> None:
    q, _, _ = operands(33, heads=2, width=32, device=device)
    _, k, _ = operands(70, heads=2, width=32, device=device)
    _, _, v = operands(70, heads=2, width=64, device=device)
    assert error(attend(q, k, v), expect(q, k, v)) < ERROR[torch.float32]


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("scratch", [False, True])
def test_ways_through_memory(
    descriptors: bool, scratch: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda" and descriptors and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a copy engine (sm_90)")
    for dtype in DTYPES:
        x = operands(197, heads=2, width=80, device=device, dtype=dtype)
        way = partial(attention_launch.attend, descriptors=descriptors, scratch=scratch)
        monkeypatch.setattr(kernels, "launch", way)
        assert error(attend(*x), expect(*x)) < ERROR[dtype]


def test_steps_cover_the_keys() -> None:
    for block in (32, 64, 128):
        for narrowest in (16, 32):
            for keys in range(1, 400):
                whole, half, tail = attention_launch.steps(keys, block, narrowest)
                covered = keys // block * block + (block // 2 if half else 0)
                assert whole == (keys >= block)
                assert covered <= keys <= covered + tail
                assert (tail == 0) == (covered == keys)
                assert tail == 0 or narrowest <= tail <= block


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1024, 1370, 4096])
@pytest.mark.parametrize("values", ["int8", "float", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_long_sequences(tokens: int, values: str, dtype: torch.dtype, device: torch.device) -> None:
    if values == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8 matrix units (sm_89)")
    x = operands(tokens, heads=2, device=device, dtype=dtype)
    expected = expect(*x, values=values)
    assert error(attend(*x, values=values), expected) < (4e-2 if values == "fp8" else ERROR[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["float", "int8"])
def test_operator_in_a_cuda_graph(form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # poison is no part of a graph
    from vit_efficient.kernels.int8_attention.op import int8_attend

    q, k, v = operands(577, heads=4, device=device, dtype=torch.bfloat16)
    call = partial(int8_attend, q, k, v, scale=0.125, values=form, keys="block")
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 197, 577])
def test_gradients_with_the_kernel_forward(tokens: int, device: torch.device) -> None:
    """In training the kernel computes the forward; the backward is still the definition's."""
    from vit_efficient.kernels.int8_attention import op

    here = [x.detach().requires_grad_() for x in operands(tokens, device=device, dtype=torch.bfloat16)]
    there = [x.detach().cpu().float().requires_grad_() for x in here]
    upstream = torch.randn(1, 3, tokens, 64)
    y, expected = op.int8_attention(*here, scale=0.125), op.int8_attention(*there, scale=0.125)
    assert error(y.cpu(), expected) < ERROR[torch.bfloat16]
    y.backward(upstream.to(device, y.dtype))
    expected.backward(upstream.to(torch.bfloat16).float())
    for own, other in zip(here, there, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        if other.grad.abs().max() > 1e-5:  # softmax over one key has no slope
            assert error(own.grad.cpu(), other.grad) < 2e-2
