"""The backward pass of attention: that its definition is PyTorch's, and that the operator keeps PyTorch's rules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.attention_gradient import op


def operands(
    batch: int, heads: int, tokens: int, width: int, scale: float, size: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the operator takes but for the scale, and PyTorch's gradient of the fused projection in float64."""
    packed = torch.randn(batch, tokens, 3, heads, width).to(dtype)
    packed[:, :, 0] *= size
    exact = packed.double().requires_grad_()
    out = F.scaled_dot_product_attention(*exact.permute(2, 0, 3, 1, 4).unbind(0), scale=scale)
    grad = torch.randn(batch, tokens, heads, width).to(dtype).transpose(1, 2)
    (wanted,) = torch.autograd.grad(out, exact, grad.double())
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    lse = (scale * (q.double() @ k.double().mT)).logsumexp(-1).float()
    out = out.detach().to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return (grad, q, k, v, out, lse), wanted.reshape(batch * tokens, -1)


@pytest.mark.parametrize("size", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("tokens", [1, 5, 65, 197])
def test_the_definition_is_pytorchs(tokens: int, size: float) -> None:
    given, wanted = operands(2, 3, tokens, 16, 0.3, size)
    made, sums = op.attention_gradient(*given, 0.3)
    assert (made - wanted).norm() <= 1e-5 * wanted.norm()
    assert (sums - wanted.sum(0)).norm() <= 1e-5 * wanted.norm()
    with_a_width = *given[:5], given[5].unsqueeze(-1)
    assert torch.equal(op.attention_gradient(*with_a_width, 0.3)[0], made)


def test_sums_are_of_what_is_not_rounded() -> None:
    given, _ = operands(2, 3, 9, 16, 0.3, dtype=torch.bfloat16)
    made, sums = op.attention_gradient(*given, 0.3)
    _, exact = op.attention_gradient(*(x.float() for x in given), 0.3)
    assert made.dtype == torch.bfloat16
    assert sums.dtype == torch.float32
    assert torch.equal(sums, exact)


def test_autocast_changes_nothing() -> None:
    given, _ = operands(2, 2, 7, 8, 0.3)
    made, sums = op.attention_gradient(*given, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        again, sums_again = op.attention_gradient(*given, 0.3)
    assert torch.equal(made, again)
    assert torch.equal(sums, sums_again)


def test_the_operator_keeps_pytorchs_rules() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given, _ = operands(2, 3, 7, 8, 0.3, dtype=dtype)
        torch.library.opcheck(op.attention_gradient, (*given, 0.3))
        torch.library.opcheck(op.attention_gradient, (*(x.contiguous() for x in given), 0.3))


def test_no_images() -> None:
    made, sums = op.attention_gradient(*torch.ones(5, 0, 2, 5, 4).unbind(0), torch.ones(0, 2, 5), 1.0)
    assert made.shape == (0, 24)
    assert sums.tolist() == [0] * 24


def test_what_the_kernel_is_meant_for() -> None:
    def meant(*shape: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return op.fits(torch.empty(shape, dtype=dtype))

    assert meant(2, 16, 197, 64)
    assert meant(2, 16, op.LONGEST, 32, dtype=torch.float16)
    assert not meant(2, 16, 197, 128)
    assert not meant(2, 16, op.LONGEST + 1, 64)
    assert not meant(2, 16, 197, 80)
    assert not meant(2, 16, 197, 64, dtype=torch.float32)
