"""`quantize` and `layernorm_quant` against their definitions. Shapes: B batch, T tokens, D columns."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels.layernorm_quant import reference as norms
from vit_efficient.kernels.layernorm_quant import triton as norm_kernels
from vit_efficient.kernels.quantize import reference
from vit_efficient.kernels.quantize import triton as kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = (1, 67) if INTERPRETED else (1, 63, 196, 197, 198, 256, 257, 577, 5000)
WIDTHS = (64, 70, 1024) if INTERPRETED else (64, 70, 192, 384, 768, 1000, 1024, 1280, 4096, 5000)
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


def rows(count: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random rows, with awkward ones among them."""
    x = torch.randn(count, width) * 3
    for index, value in enumerate((0.0, 1.0, -65000.0, 6e-8, float("nan"), float("inf"))):
        if index + 1 < count:
            x[index + 1] = value
    if count > 8:
        x[7, 3], x[8, 1] = float("nan"), -float("inf")
    return x.to(dtype).to(device)


def same_codes(found: Tensor, expected: Tensor, least: float = 1.0) -> None:
    """Equal; in the interpreter, which truncates where a rounded e4m3 number would carry, nearly."""
    assert found.dtype == expected.dtype
    if expected.dtype == torch.float8_e4m3fn and INTERPRETED:
        least = 0.8
    differ = int((found.float() != expected.float()).sum())  # a mean of ones is less than 1 on a GPU
    assert differ <= (1 - least) * found.numel(), f"{differ} of {found.numel()} codes differ"


def same_scales(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected.contiguous(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("count", ROWS)
def test_codes_are_those_of_the_definition(
    count: int, static: bool, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    scale = torch.tensor([0.0213], device=device) if static else None
    for width in WIDTHS:
        x = rows(count, width, dtype, device)
        codes, scales = kernels.quantize(x, form, scale)
        expected, expected_scales = reference.quantize(x, form, scale)
        same_scales(scales, expected_scales)
        whole = ~expected_scales.isnan().squeeze(1)
        same_codes(codes[whole], expected[whole])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("count", ROWS)
def test_codes_of_shifted_and_smoothed_columns(
    count: int, static: bool, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    scale = torch.tensor([0.0213], device=device) if static else None
    for width in WIDTHS:
        x = rows(count, 2 * width, dtype, device)[:, width:]
        shift, smooth = torch.randn(width, device=device), torch.rand(width, device=device) * 4 + 1e-3
        for one, other in ((shift, None), (None, smooth), (shift, smooth)):
            reciprocal = None if other is None else other.reciprocal()
            codes, scales = kernels.quantize(x, form, scale, one, other, reciprocal)
            expected, expected_scales = reference.quantize(x, form, scale, one, other)
            same_scales(scales, expected_scales)
            whole = ~expected_scales.isnan().squeeze(1)
            same_codes(codes[whole], expected[whole])


def test_ties_go_to_even_under_a_given_scale(device: torch.device) -> None:
    scale = torch.tensor([0.0213], device=device)
    x = torch.randint(-300, 300, (64, 1024)).to(device) / 2 * scale
    codes, _ = kernels.quantize(x, "int8", scale)
    same_codes(codes, reference.quantize(x, "int8", scale)[0])


def test_ties_show_that_smoothing_divides(device: torch.device) -> None:
    """Half codes times odd numbers: a product with the rounded reciprocal would miss many of the ties."""
    scale = torch.tensor([0.25], device=device)
    smooth = torch.arange(3, 259, 2, device=device).float()
    x = (torch.randint(-140, 140, (64, len(smooth)), device=device) + 0.5) * smooth * scale
    codes, _ = kernels.quantize(x, "int8", scale, None, smooth, smooth.reciprocal())
    expected = reference.quantize(x, "int8", scale, None, smooth)[0]
    same_codes(codes, expected)
    by_product = reference.quantize(x * smooth.reciprocal(), "int8", scale)[0]
    assert (by_product != expected).float().mean() > 0.01


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_given_range_leaves_out(dtype: torch.dtype, form: str, device: torch.device) -> None:
    scale = torch.tensor([0.25], device=device)
    largest = 127 if form == "int8" else 7
    ends = torch.tensor([largest, largest + 0.25, largest + 0.5, largest + 0.75, largest + 1.0, 1e4, float("inf")])
    x = torch.cat([ends, -ends, torch.tensor([0.0, float("nan")])]).to(device) * scale
    x = torch.cat([x[None].expand(5, -1), torch.randn(5, len(x), device=device) * largest / 3], dim=0).to(dtype)
    codes, scales, beyond = kernels.quantize_clipping(x, form, scale)
    expected, expected_scales = reference.quantize(x, form, scale)
    assert beyond.dtype == torch.bool
    assert torch.equal(beyond, reference.beyond(x, form, scale))
    assert beyond[0].any()
    assert not beyond[0].all()
    same_scales(scales, expected_scales)
    same_codes(codes[~x.isnan()], expected[~x.isnan()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.parametrize("one_scale", [False, True])
def test_what_codes_stand_for(one_scale: bool, form: str, dtype: torch.dtype, device: torch.device) -> None:
    for count in ROWS:
        for width in WIDTHS:
            codes, scales = reference.quantize(torch.randn(count, 2 * width, device=device), form)
            codes = codes.view(torch.uint8)[:, width:].view(codes.dtype)
            scales = scales[:1] if one_scale else scales
            if count > 2 and not one_scale:
                scales[2] = float("nan")
            found, expected = kernels.dequantize(codes, scales, dtype), reference.dequantize(codes, scales, dtype)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_strided_rows(device: torch.device) -> None:
    whole = torch.randn(40, 300).to(device)
    for x in (whole[::2, 5:200], whole.t()[:, ::3]):
        codes, scales = kernels.quantize(x, "int8", None)
        expected, expected_scales = reference.quantize(x, "int8")
        same_scales(scales, expected_scales)
        same_codes(codes, expected)


def test_rows_that_no_program_can_hold_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        kernels.quantize(torch.zeros(1, 2**16 + 1, device=device), "int8", None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("count", ROWS)
def test_the_norm_and_the_sum(count: int, affine: bool, gamma: bool, dtype: torch.dtype, device: torch.device) -> None:
    for width in WIDTHS:
        x, old = (torch.randn(count, width).to(dtype).to(device) for _ in range(2))
        weight, bias = (torch.randn(width, device=device) if affine else None for _ in range(2))
        layer_scale = torch.rand(width).to(dtype).to(device) if gamma else None
        close = {"rtol": {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype], "atol": 1e-5}
        y = norm_kernels.layernorm(x, weight, bias, 1e-6, dtype)
        assert y.dtype == dtype
        torch.testing.assert_close(y, norms.layernorm(x, weight, bias, 1e-6, dtype), **close)
        y, new = norm_kernels.add_layernorm(x, old, layer_scale, weight, bias, 1e-6, dtype)
        expected, expected_new = norms.add_layernorm(x, old, layer_scale, weight, bias, 1e-6, dtype)
        assert torch.equal(new, expected_new)
        torch.testing.assert_close(y, expected, **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("count", ROWS)
def test_the_norm_ends_in_codes(count: int, static: bool, form: str, dtype: torch.dtype, device: torch.device) -> None:
    scale = torch.tensor([0.0213], device=device) if static else None
    for width in WIDTHS:
        x, old = (torch.randn(count, width).to(dtype).to(device) for _ in range(2))
        weight, bias = (torch.randn(width, device=device) for _ in range(2))
        codes, scales = norm_kernels.layernorm_quant(x, weight, bias, 1e-6, form, scale)
        expected, expected_scales = norms.layernorm_quant(x, weight, bias, 1e-6, form, scale)
        torch.testing.assert_close(scales, expected_scales.contiguous(), rtol=1e-5, atol=0)
        same_codes(codes, expected, least=0.999)
        *found, new = norm_kernels.add_layernorm_quant(x, old, None, weight, bias, 1e-6, form, scale)
        codes, scales, expected_new = norms.add_layernorm_quant(x, old, None, weight, bias, 1e-6, form, scale)
        assert torch.equal(new, expected_new)
        torch.testing.assert_close(found[1], scales.contiguous(), rtol=1e-5, atol=0)
        same_codes(found[0], codes, least=0.999)


def test_a_row_with_a_nan_shows_in_its_scale(device: torch.device) -> None:
    x = torch.randn(5, 96, device=device)
    x[2, 7] = float("nan")
    for form in ("int8", "fp8"):
        for scale in (None, torch.tensor([0.02], device=device)):
            _, scales = norm_kernels.layernorm_quant(x, None, None, 1e-6, form, scale)
            assert scales.isnan().flatten().tolist() == [False, False, True, False, False]
