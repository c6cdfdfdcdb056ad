"""`torch._scaled_mm` under the fp8 layer, against the definition and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vit_efficient.kernels.fp8_linear import op, passes, reference
from vit_efficient.kernels.fp8_linear.reference import Scheme

pytestmark = pytest.mark.gpu
SCHEMES = [Scheme(weights=w, activations=a) for w in ("channel", "tensor") for a in ("token", "tensor")]
ROWS = (1, 63, 196, 197, 198, 256, 257, 577)
# (K, N): ViT-Ti and ViT-L, and what has to be padded.
SHAPES = ((192, 576), (768, 192), (1024, 3072), (4096, 1024), (100, 40), (192, 1000))
# Of outputs relative to their norm. bfloat16 rounds to 2**-9; "fast" sums have about 14 bits on Hopper.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-3}
FAST = 1e-2


@pytest.fixture(autouse=True)
def _capable() -> None:
    if not op.has_units(0):
        pytest.skip("needs fp8 matrix units (sm_89)")


def operands(rows: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (torch.randn(size, k, device="cuda") for size in (rows, n))
    return x, weight, torch.randn(n, device="cuda")


def exact(x: Tensor, weight: Tensor, bias: Tensor, scheme: Scheme) -> Tensor:
    """The layer on the same codes and scales, in float64."""
    q_MK, s_x = reference.quantize_activations(x, scheme)
    q_NK, s_w = reference.quantize_weight(weight, scheme)
    return (q_MK.double() * s_x.double()) @ (q_NK.double() * s_w.double()).T + bias.double()


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("k", [192, 100, 4096])
def test_codes_and_scales_are_those_of_the_cpu(k: int, scheme: Scheme) -> None:
    x, weight, _ = operands(197, k, 40)
    x[1], x[2], x[3] = 0, 1e30, 1e-38
    for quantize, tensor in ((reference.quantize_activations, x), (reference.quantize_weight, weight)):
        for own, wanted in zip(quantize(tensor, scheme), quantize(tensor.cpu(), scheme), strict=True):
            assert torch.equal(own.cpu().view(torch.uint8), wanted.view(torch.uint8))  # to the last bit


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(activations="static")], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_passes_of_one_kernel_are_those_of_the_definition(dtype: torch.dtype, scheme: Scheme) -> None:
    x, weight, _ = (one.to(dtype) for one in operands(197, 192, 40))
    x[5, 3] = torch.nan
    given = torch.tensor(0.003, device="cuda") if scheme.activations == "static" else None
    made = passes.quantize_activations(x, scheme, given), passes.quantize_weight(weight, scheme)
    wanted = reference.quantize_activations(x, scheme, given), reference.quantize_weight(weight, scheme)
    for (codes, scales), (own, its) in zip(made, wanted, strict=True):
        whole = ~its.isnan().expand(codes.shape[0], 1).squeeze(1)
        assert torch.equal(codes[whole].float(), own[whole].float())
        torch.testing.assert_close(scales, its, rtol=0, atol=0, equal_nan=True)
        there, definition = passes.dequantize(own, its, dtype), reference.dequantize(own, its, dtype)
        torch.testing.assert_close(there, definition, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_product_on_the_units(rows: int, k: int, n: int, dtype: torch.dtype, scheme: Scheme) -> None:
    x, weight, bias = operands(rows, k, n)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = op.fp8_linear(x, weight, bias, scheme)
    assert got.dtype == dtype
    assert got.shape == (rows, n)
    assert error(got, exact(x, weight, bias, scheme)) < TOLERANCE[dtype]
    assert error(got, reference.fp8_linear(x, weight, bias, scheme)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_fast_accumulation_is_near(k: int, n: int) -> None:
    x, weight, bias = operands(257, k, n)
    for scheme in SCHEMES:
        fast = Scheme(scheme.weights, scheme.activations, "fast")
        with torch.autocast("cuda", torch.bfloat16):
            assert error(op.fp8_linear(x, weight, bias, fast), exact(x, weight, bias, scheme)) < FAST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_training_equals_deployed_bit_for_bit(scheme: Scheme, dtype: torch.dtype) -> None:
    x, weight, bias = operands(197, 192, 576)
    codes, scale = reference.quantize_weight(weight, scheme)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        trained = op.fp8_linear(x, weight, bias, scheme)
        assert torch.equal(trained, op.fp8_linear_codes(x, codes, scale, bias, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_cpu(scheme: Scheme) -> None:
    tensors = [t.requires_grad_() for t in operands(197, 192, 576)]
    copies = [t.detach().cpu().requires_grad_() for t in tensors]
    upstream = torch.randn(197, 576)
    op.fp8_linear(*tensors, scheme).backward(upstream.cuda())
    op.fp8_linear(*copies, scheme).backward(upstream)
    for own, wanted in zip(tensors, copies, strict=True):
        assert error(own.grad.cpu(), wanted.grad) < 1e-3  # float32, or TF32 where it is on


def test_what_is_not_finite_is_seen() -> None:
    x, weight, bias = operands(33, 192, 48)
    x[7, 3] = torch.inf
    for dtype in TOLERANCE:
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            y = op.fp8_linear(x, weight, bias, Scheme())
        assert y[7].isnan().all()
        assert y[[6, 8]].isfinite().all()


def test_no_tokens() -> None:
    x, weight, bias = operands(33, 192, 48)
    assert op.fp8_linear(x[:0], weight, bias, Scheme()).shape == (0, 48)
