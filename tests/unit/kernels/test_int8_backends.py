"""Processors and dtypes that the integer layer must not be wrong on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_efficient.kernels.int8_linear import op, reference

OLD_CPU = """
import torch
from vit_efficient.kernels.int8_linear import op
q_MK = torch.randint(-127, 128, (65, 768), dtype=torch.int8)
q_NK = torch.randint(-127, 128, (48, 768), dtype=torch.int8)
q_MK[0], q_NK[0], q_NK[1] = 127, 127, -127
exact = q_MK.long() @ q_NK.long().T
print(bool((torch._int_mm(q_MK, q_NK.t()) == exact).all()), op.cpu_int_mm_is_exact(), end=" ")
print(bool((op.int8_matmul(q_MK, q_NK) == exact).all()))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's instruction sets are those of x86")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_exact_on_processors_whose_library_is_not(isa: str) -> None:
    """Without VNNI, `torch._int_mm` saturates and says nothing; oneDNN can be told to do without it."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OLD_CPU], env=environment, capture_output=True, text=True, check=True)
    library, believed, ours = (word == "True" for word in done.stdout.split())
    assert ours
    assert believed == library  # it is used where it is right, and only there


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40
    )
)  # fmt: skip
def test_any_finite_row_has_the_codes_of_the_definition(values: list[float]) -> None:
    x = torch.tensor([values, [-v for v in values]], dtype=torch.float32)
    codes, scale = op.quantize_rows(x)
    defined = reference.quantize_rows(x)
    assert torch.equal(codes, defined[0])
    assert torch.equal(scale, defined[1])
    assert torch.equal(codes[0], -codes[1])
    assert scale.min() >= reference.SMALLEST_SCALE
    assert codes.abs().max() <= 127
    # Half a step, and the roundings of the scale and the quotient.
    error = (codes.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() * (0.5 + 127 * 2.0**-22)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands(dtype: torch.dtype) -> None:
    """Integers and scales as float32 would have them; outputs and gradients in the dtypes of their own."""
    x = torch.randn(9, 64).to(dtype).requires_grad_()
    weight = torch.randn(16, 64).to(dtype).requires_grad_()
    y = op.int8_linear(x, weight, torch.zeros(16, dtype=dtype))
    assert torch.equal(y, reference.int8_linear(x, weight, None).to(dtype))
    y.float().square().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((9, 64), (16, 64), (16,)))
    upstream = torch.randn(9, 16)
    op.int8_linear(x, weight, bias).backward(upstream)
    full = [tensor.grad for tensor in (x, weight, bias)]
    x.grad = weight.grad = bias.grad = None
    with torch.autocast("cpu", dtype):
        y = op.int8_linear(x, weight, bias)
    y.backward(upstream.to(dtype))
    for tensor, expected in zip((x, weight, bias), full, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad - expected).norm() / expected.norm() < 0.02


def test_no_float_copy_is_kept_for_the_backward() -> None:
    x, weight = torch.randn(256, 512, requires_grad=True), torch.randn(128, 512, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        op.int8_linear(x, weight)
    assert sum(t.numel() * t.element_size() for t in kept) == (256 + 128) * 512 + (256 + 128) * 4


def test_only_the_gradients_asked_for() -> None:
    x, weight = torch.randn(5, 64), torch.randn(16, 64, requires_grad=True)
    op.int8_linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert op.int8_linear(x, weight).grad_fn is None


def test_no_tokens() -> None:
    x, weight = torch.randn(0, 7, 64, requires_grad=True), torch.randn(16, 64, requires_grad=True)
    y = op.int8_linear(x, weight)
    assert y.shape == (0, 7, 16)
    y.sum().backward()
    assert weight.grad.abs().max() == 0
