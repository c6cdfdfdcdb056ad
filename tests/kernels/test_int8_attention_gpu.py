"""Mixed-precision attention on a GPU: the same integers and logits as on the CPU, bit for bit; outputs within rounding.

Shapes: B batch, H heads, N tokens, E head width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vit_efficient.kernels.int8_attention import op, reference

pytestmark = pytest.mark.gpu
Operands = tuple[Tensor, Tensor, Tensor]


def operands(tokens: int, width: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Operands:
    """On the CPU, in values that `dtype` can hold; strided views as an attention module makes them."""
    qkv = torch.randn(2, tokens, 9 * width).mul(size).to(dtype)
    q, k, v = qkv.unflatten(-1, (3, 3, width)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach().cpu().double() - b.detach().double()).norm() / b.detach().double().norm())


@pytest.mark.parametrize("form", ["token", "tensor", "static"])
@pytest.mark.parametrize("width", [32, 64, 80, 88])
@pytest.mark.parametrize("tokens", [1, 63, 196, 197, 198, 257])
def test_codes_sums_and_logits_are_those_of_the_cpu(tokens: int, width: int, form: str) -> None:
    q, k, _ = operands(tokens, width)
    granularity = "tensor" if form == "tensor" else "token"
    scale = torch.tensor(0.02) if form == "static" else None
    found = []
    for device in ("cpu", "cuda"):
        given = None if scale is None else scale.to(device)
        (cq, sq), (ck, sk) = (reference.quantize(x.to(device), granularity, given) for x in (q, k))  # type: ignore[arg-type]
        with torch.autocast(device, torch.bfloat16):
            sums = reference.int8_matmul(cq, ck)
        found.append([cq, sq, ck, sk, sums, reference.logits(sums, sq, sk, 0.3)])
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there.cpu())


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_sums_are_exact_with_and_without_tf32(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        codes = torch.full((2, 3, 197, 1040), 127, dtype=torch.int8, device="cuda")
        codes[..., 0] = 126
        assert (reference.int8_matmul(codes, codes) == 127**2 * 1039 + 126**2).all()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("tokens", [1, 197, 257])
def test_outputs_and_gradients_are_those_of_the_cpu(tokens: int, size: float, dtype: torch.dtype) -> None:
    here = [x.detach().requires_grad_() for x in operands(tokens, 64, dtype, size)]
    there = [x.detach().cuda().requires_grad_() for x in here]
    bias = torch.randn(1, 3, tokens, tokens)
    upstream = torch.randn(2, 3, tokens, 64).to(dtype)
    expected = op.int8_attention(*here, bias=bias, scale=0.125)
    y = op.int8_attention(*there, bias=bias.cuda(), scale=0.125)
    bound = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert y.dtype == dtype
    assert distance(y, expected) < bound
    expected.backward(upstream)
    y.backward(upstream.cuda())
    for a, b in zip(there, here, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        if b.grad.abs().max() > 1e-5:  # softmax over one key has no slope
            assert distance(a.grad, b.grad) < bound
