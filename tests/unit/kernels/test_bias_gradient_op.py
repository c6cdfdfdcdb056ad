"""Gradients with their sums: what they are, and that the operators keep PyTorch's rules."""

from __future__ import annotations

import torch

from vit_efficient.kernels.bias_gradient import op, reference
from vit_efficient.model import gelu


def test_the_slope_is_that_of_compiled_gelu() -> None:
    assert reference.P == gelu.P
    x = torch.linspace(-12, 12, 20_001).requires_grad_()
    (wanted,) = torch.autograd.grad(gelu.gelu(x).sum(), x)
    torch.testing.assert_close(reference.slope(x.detach()), wanted, rtol=0, atol=0)


def test_sums_are_of_what_is_not_rounded() -> None:
    grad, x = torch.randn(300, 40).bfloat16(), torch.randn(300, 40).bfloat16()
    made, sums = op.gelu_gradient(grad, x)
    exact = grad.double() * reference.slope(x.float()).double()
    assert made.dtype == torch.bfloat16
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), exact.sum(0), rtol=1e-5, atol=1e-5)


def test_heads_are_those_of_the_fused_projection() -> None:
    qkv = torch.randn(2, 5, 3 * 4 * 8, dtype=torch.float64).requires_grad_()
    heads = qkv.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    grads = [torch.randn_like(x) for x in heads]
    (wanted,) = torch.autograd.grad(heads, qkv, grads)
    made, sums = op.heads_gradient(*grads)
    assert torch.equal(made.view(qkv.shape), wanted)
    torch.testing.assert_close(sums, wanted.sum((0, 1)).float())


def test_operators_keep_pytorchs_rules() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        grad, x = torch.randn(2, 7, 12, dtype=dtype).unbind(0)
        torch.library.opcheck(op.gelu_gradient, (grad, x))
        torch.library.opcheck(op.gelu_gradient, (grad.t().contiguous().t(), x))
        q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=dtype).unbind(0)
        torch.library.opcheck(op.heads_gradient, (q, k, v))
        torch.library.opcheck(op.heads_gradient, (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))


def test_no_rows() -> None:
    made, sums = op.gelu_gradient(torch.ones(0, 4), torch.ones(0, 4))
    assert made.shape == (0, 4)
    assert sums.tolist() == [0] * 4
    made, sums = op.heads_gradient(*torch.ones(3, 0, 2, 5, 4).unbind(0))
    assert made.shape == (0, 24)
    assert sums.tolist() == [0] * 24
