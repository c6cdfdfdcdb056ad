"""GELU for compiled programs: its values, its slope, where it is taken."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from vit_efficient.model.gelu import CompiledGELU, gelu, shorten_gelu, tail


def test_values_and_slope() -> None:
    x = torch.linspace(-12, 12, 200_001).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, wanted = gelu(x), F.gelu(exact)
    assert (y - wanted).abs().max() < 1e-6
    (slope,), (of_exact,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), exact)
    assert (slope - of_exact).abs().max() < 4e-5
    beyond, density = tail(x.detach())
    assert (beyond - torch.special.ndtr(-x.detach().double().abs())).abs().max() < 4e-5
    torch.testing.assert_close(density, torch.exp(-(x.detach() ** 2) / 2), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_as_pytorch_rounds(dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 50_000).to(dtype)
    torch.testing.assert_close(gelu(x), F.gelu(x.double()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_what_is_no_number_stays_none() -> None:
    y = gelu(torch.tensor([torch.nan, torch.inf, 1e30]))
    assert y[:2].isnan().all()  # infinity too, as PyTorch's on a CPU
    assert y[2] == 1e30


def test_only_the_erf_form_is_replaced() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    model.blocks[1].mlp.act = nn.GELU(approximate="tanh")
    shorten_gelu(model)
    assert type(model.blocks[0].mlp.act) is CompiledGELU
    assert type(model.blocks[1].mlp.act) is nn.GELU
    x = torch.randn(3, 5)
    assert model.blocks[0].mlp.act(x).equal(F.gelu(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_a_gpu(dtype: torch.dtype) -> None:
    x = torch.randn(1000, 100, device="cuda").to(dtype).requires_grad_()
    act = torch.compile(CompiledGELU(), fullgraph=True)
    y, wanted = act(x), F.gelu(x)
    torch.testing.assert_close(y, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=2e-6)
    (slope,), (exact,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), x)
    torch.testing.assert_close(slope, exact, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
