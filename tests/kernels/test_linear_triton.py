"""The kernel of linear layers on codes against its definition. Shapes: B batch, T tokens, H heads, E head width."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed; it exists for Linux only")

from vit_efficient.kernels.linear import launch, reference
from vit_efficient.kernels.quantize.reference import quantize
from vit_efficient.kernels.tuning import Tile, forced

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOKENS = (1, 63, 101) if INTERPRETED else (1, 63, 196, 197, 198, 256, 257, 577)
SIZES = ((64, 96), (70, 90)) if INTERPRETED else ((192, 576), (70, 90), (1024, 1000), (1000, 1024))  # inputs, outputs
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
FORMS = ("int8", "fp8")
SMALL = Tile(32, 64, 32, group=2, warps=4, stages=2) if INTERPRETED else Tile(64, 64, 64, group=4, warps=4, stages=3)


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiles that compile in a second or two; a test marked `shipped` takes those of the table."""
    if "shipped" in request.fixturenames:
        yield
    else:
        with forced(SMALL):
            yield


@pytest.fixture
def shipped() -> None:
    """The tiles of the shipped table."""


class Layer(NamedTuple):
    """Operands as the kernel takes them."""

    q: Tensor
    scale: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def product(self) -> Tensor:
        return reference.product(*self)


def layer(form: str, rows: int, inputs: int, outputs: int, device: torch.device, bias: bool = True) -> Layer:
    q, scale = quantize(torch.randn(rows, inputs, device=device), form)
    weight, weight_scale = quantize(torch.randn(outputs, inputs, device=device), form)
    return Layer(q, scale, weight, weight_scale, torch.randn(outputs, device=device) if bias else None)


def check(found: Tensor, expected: Tensor, exact: bool) -> None:
    """Bit for bit, or within what the order of float32 sums and rounding to the result's dtype leave."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.is_contiguous()
    if exact:
        assert torch.equal(found, expected)
        return
    a, b = found.double(), expected.double()
    bound = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[expected.dtype]
    # On Hopper fp8 products are summed in about 14 bits before float32 takes over.
    assert (a - b).norm() <= max(bound, 0 if INTERPRETED else 2e-3) * b.norm()


def check_codes(found: Tensor, expected: Tensor, least: float) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype == torch.float8_e4m3fn:  # the interpreter truncates where a rounded number would carry
        least = 0.9 if INTERPRETED else 0.98
    differ = int((found.float() != expected.float()).sum())  # a mean of ones is less than 1 on a GPU
    few = 0 if least == 1 else 4  # of a single row, a share says little
    assert differ <= max(few, (1 - least) * found.numel()), f"{differ} of {found.numel()} codes differ"


def close_scales(found: Tensor, expected: Tensor, exact: bool) -> None:
    assert found.shape == expected.shape
    tolerance = 0.0 if exact else 1e-6 if INTERPRETED else 5e-3
    torch.testing.assert_close(found, expected.contiguous(), rtol=tolerance, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", TOKENS)
def test_the_product(rows: int, size: tuple[int, int], form: str, device: torch.device) -> None:
    whole = layer(form, rows, *size, device)
    one = whole._replace(scale=whole.scale[:1], weight_scale=whole.weight_scale[:1], bias=None)
    for each in (whole, one):
        for dtype in DTYPES:
            found = launch.linear(*each, False, dtype, False)
            check(found, each.product().to(dtype), exact=form == "int8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("one_row_scale", [False, True])
def test_one_scale_in_all_on_either_side(one_row_scale: bool, form: str, device: torch.device) -> None:
    for size in SIZES:
        one = layer(form, 63, *size, device)
        one = one._replace(scale=one.scale[:1]) if one_row_scale else one._replace(weight_scale=one.weight_scale[:1])
        found = launch.linear(*one, False, torch.float32, False)
        check(found, one.product(), exact=form == "int8")
        given = torch.tensor([0.0213], device=device)
        codes, scales = launch.linear_quant(*one, False, given, form, False)
        expected, expected_scales = reference.requantized(one.product(), one.scale, given, form)
        check_codes(codes, expected, least=1.0 if form == "int8" else 0.999)
        close_scales(scales, expected_scales, exact=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_bias_of_16_bits(dtype: torch.dtype, form: str, device: torch.device) -> None:
    for size in SIZES:
        one = layer(form, 63, *size, device)
        one = one._replace(bias=one.bias.to(dtype))  # type: ignore[union-attr]
        check(launch.linear(*one, False, torch.float32, False), one.product(), exact=form == "int8")
        residual, gamma = torch.randn(63, size[1], device=device), torch.randn(size[1], device=device).to(dtype)
        found = launch.linear_residual(*one, residual, gamma, False)
        check(found, reference.with_residual(one.product(), residual, gamma), exact=form == "int8")


@pytest.mark.parametrize("rows", TOKENS)
def test_fast_sums(rows: int, device: torch.device) -> None:
    """On a CPU they are full ones; the program is another."""
    scale, dtype = torch.tensor([0.0213], device=device), DTYPES[-1]
    for size in SIZES:
        one = layer("fp8", rows, *size, device)
        check(launch.linear(*one, False, dtype, True), one.product().to(dtype), exact=False)
        residual = torch.randn(rows, size[1], device=device).to(dtype)
        found = launch.linear_residual(*one, residual, None, True)
        check(found, reference.with_residual(one.product(), residual, None), exact=False)
        codes, scales = launch.linear_quant(*one, True, scale, "fp8", True)
        y = launch.linear(*one, True, torch.float32, True)  # the same sums
        expected, expected_scales = reference.requantized(y, one.scale, scale, "fp8")
        check_codes(codes, expected, least=0.98)
        close_scales(scales, expected_scales, exact=True)
    one = layer("fp8", rows, 64, 96, device)
    y = reference.heads_first(one.product(), rows, 1, 3)
    check(launch.linear_heads(*one, rows, 1, 3, dtype, True), y.to(dtype), exact=False)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gelu", [False, True])
def test_codes_of_four_bits(gelu: bool, form: str, device: torch.device) -> None:
    scale = torch.tensor([0.213], device=device)
    for size in SIZES:
        one = layer(form, 63, *size, device)
        y = launch.linear(*one, gelu, torch.float32, False)  # the same sums, which other tests hold to the definition
        codes, scales = launch.linear_quant(*one, gelu, scale, "int4", False)
        expected, expected_scales = reference.requantized(y, one.scale, scale, "int4")
        assert codes.max() == 7
        check_codes(codes, expected, least=0.999)
        close_scales(scales, expected_scales, exact=True)


@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_written(form: str, device: torch.device) -> None:
    one = layer(form, 197, 64, 90, device)
    for fill in (float("nan"), 7.0):
        out = torch.full((197, 90), fill, device=device)
        launch.launch(*one, launch.Form(), False, out)
        check(out, one.product(), exact=form == "int8")


def test_rows_of_all_maxima_beyond_what_float32_counts(device: torch.device) -> None:
    inputs = 1200 if INTERPRETED else 4096
    q = torch.full((3, inputs), 127, dtype=torch.int8, device=device)
    q[1] = -127
    q[2, ::7] = 126
    ones = torch.ones(3, 1, device=device)
    found = launch.linear(q, ones, q, ones, None, False, torch.float32, False)
    assert found[0, 0] == float(torch.tensor(127**2 * inputs, dtype=torch.float32))
    check(found, reference.product(q, ones, q, ones, None), exact=True)


@pytest.mark.parametrize("form", FORMS)
def test_strided_operands(form: str, device: torch.device) -> None:
    one = layer(form, 65, 160, 80, device)
    raw = one.q.view(torch.uint8), one.weight.view(torch.uint8)
    q, weight = (x.view(one.q.dtype) for x in (raw[0][::2, :96], raw[1][:, :96]))
    strided = one._replace(q=q, scale=one.scale[::2], weight=weight)
    check(launch.linear(*strided, False, torch.float32, False), strided.product(), exact=form == "int8")
    offset = one._replace(q=raw[0][:, 3:99].view(q.dtype), weight=raw[1][:, 3:99].view(q.dtype))
    check(launch.linear(*offset, False, torch.float32, False), offset.product(), exact=form == "int8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", TOKENS)
def test_gelu_and_its_codes(rows: int, form: str, device: torch.device) -> None:
    scale = torch.tensor([0.0213], device=device)
    for size in SIZES:
        one = layer(form, rows, *size, device)
        y = reference.gelu(one.product())
        found = launch.linear(*one, True, torch.float32, False)
        if form == "int8":
            torch.testing.assert_close(found, y, rtol=0, atol=4e-6)
        else:
            check(found, y, exact=False)
        codes, scales = launch.linear_quant(*one, True, scale, form, False)
        expected, expected_scales = reference.requantized(y, one.scale, scale, form)
        check_codes(codes, expected, least=0.999)
        close_scales(scales, expected_scales, exact=True)
        if form == "int8":
            assert (codes.int() - expected.int()).abs().max() <= 1


def columns(outputs: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Shift, smoothing and its reciprocal: numbers a column, not next to each other in memory."""
    shift, smooth = torch.randn(outputs, 2, device=device)[:, 0], torch.rand(outputs, 2, device=device)[:, 1] * 4 + 1e-3
    return shift, smooth, smooth.reciprocal()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", TOKENS)
@pytest.mark.parametrize("absent", [(), ("shift",), ("smooth",)])
def test_codes_of_shifted_and_smoothed_columns(
    absent: tuple[str, ...], rows: int, form: str, device: torch.device
) -> None:
    scale = torch.tensor([0.0213], device=device)
    for size in SIZES:
        one = layer(form, rows, *size, device)
        one.bias[0], one.bias[-1] = 3e38, -1e30  # beyond every code, and beyond float32 where divided first
        shift, smooth, reciprocal = columns(size[1], device)
        shift = None if "shift" in absent else shift
        smooth, reciprocal = (None, None) if "smooth" in absent else (smooth, reciprocal)
        for gelu in (False, True):
            y = reference.gelu(one.product()) if gelu else one.product()
            codes, scales = launch.linear_quant(*one, gelu, scale, form, False, shift, smooth, reciprocal)
            expected, expected_scales = reference.requantized(y, one.scale, scale, form, shift, smooth)
            exact = form == "int8" and not gelu
            if form == "fp8":
                codes, expected = codes[:, 1:], expected[:, 1:]  # what is beyond float32 has no code there
            check_codes(codes, expected, least=1.0 if exact else 0.999)
            close_scales(scales, expected_scales, exact=True)
            if form == "int8":
                assert (codes.int() - expected.int()).abs().max() <= 1


def test_ties_show_that_smoothed_columns_are_divided(device: torch.device) -> None:
    """Half codes times odd numbers, less a shift: the two roundings of the definition, and no others."""
    scale, outputs = torch.tensor([0.25], device=device), 128
    smooth = torch.arange(3, 259, 2, device=device).float()
    shift = torch.randint(-500, 500, (outputs,), device=device).float()
    one = layer("int8", 5, 64, outputs, device)
    one.q.zero_()
    for _ in range(4):
        half = (torch.randint(-140, 140, (outputs,), device=device) + 0.5) * smooth * scale
        now = one._replace(bias=half + shift)
        codes, _ = launch.linear_quant(*now, False, scale, "int8", False, shift, smooth, smooth.reciprocal())
        assert torch.equal(codes, reference.requantized(now.product(), one.scale, scale, "int8", shift, smooth)[0])


def test_shifted_and_smoothed_columns_of_strided_rows(device: torch.device) -> None:
    scale = torch.tensor([0.0213], device=device)
    one = layer("int8", 65, 160, 80, device)
    one = one._replace(q=one.q[::2, 3:99], scale=one.scale[::2], weight=one.weight[:, :96])
    vectors = columns(80, device)
    codes, _ = launch.linear_quant(*one, False, scale, "int8", False, *vectors)
    assert torch.equal(codes, reference.requantized(one.product(), one.scale, scale, "int8", *vectors[:2])[0])


def test_gelu_is_as_exact_as_pytorchs(device: torch.device) -> None:
    y = torch.linspace(-12, 12, 4001, device=device)
    one = torch.ones(1, 16, dtype=torch.int8, device=device), torch.zeros(1, 1, device=device)
    weight = torch.ones(4001, 16, dtype=torch.int8, device=device), torch.ones(4001, 1, device=device)
    found = launch.linear(*one, *weight, y, True, torch.float32, False)[0]
    exact = torch.nn.functional.gelu(y.double())
    assert (found - exact).abs().max() < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gamma", [False, True])
def test_the_residual(gamma: bool, dtype: torch.dtype, form: str, device: torch.device) -> None:
    for rows in TOKENS:
        for inputs, outputs in SIZES:
            one = layer(form, rows, inputs, outputs, device)
            residual = torch.randn(rows, 2 * outputs, device=device).to(dtype)[:, ::1][:, :outputs]
            layer_scale = torch.randn(outputs, device=device) if gamma else None
            found = launch.linear_residual(*one, residual, layer_scale, False)
            check(found, reference.with_residual(one.product(), residual, layer_scale), exact=form == "int8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", [(3, 32, 3), (2, 20, 3), (2, 80, 1), (16, 64, 3), (5, 88, 3), (2, 128, 3)])
def test_heads(shape: tuple[int, int, int], tokens: int, form: str, device: torch.device) -> None:
    heads, width, parts = shape
    if INTERPRETED and heads * width * tokens > 20_000:
        pytest.skip("too large for the interpreter")
    batch, exact = 2, form == "int8"
    one = layer(form, batch * tokens, 64 if INTERPRETED else 192, parts * heads * width, device)
    y = reference.heads_first(one.product(), tokens, heads, parts)
    for dtype in DTYPES:
        check(launch.linear_heads(*one, tokens, heads, parts, dtype, False), y.to(dtype), exact=exact)
    for given in (None, torch.rand(parts, device=device) / 10 + 0.01):
        codes, scales = launch.linear_heads_quant(*one, tokens, heads, parts, form, given, False)
        expected, expected_scales = reference.quantized_heads(y, form, given)
        close_scales(scales, expected_scales, exact=exact)
        check_codes(codes, expected, least=1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("descriptors", [False, True])
def test_tiles_change_nothing(descriptors: bool, parts: int, form: str, device: torch.device) -> None:
    if descriptors and device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no copy engine before sm_90")
    one = layer(form, 300, 96, 208, device)
    residual = torch.randn(300, 208, device=device)
    tile = Tile(64, 128, 64, group=3, warps=4, stages=2, parts=parts)
    for programs in (1, 2):
        with forced(Tile(**{**vars(tile), "programs": programs})):
            out = torch.empty(300, 208, device=device)
            launch.launch(*one, launch.Form(), False, out, residual_MN=residual, descriptors=descriptors)
        check(out, reference.with_residual(one.product(), residual, None), exact=form == "int8")


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_a_number_stays_so(form: str, device: torch.device) -> None:
    one = layer(form, 6, 64, 96, device)
    one.scale[2] = float("nan")
    scale = torch.tensor([0.05], device=device)
    bad = [False, False, True, False, False, False]
    assert launch.linear(*one, True, torch.float32, False).isnan().all(dim=1).tolist() == bad
    _, scales = launch.linear_quant(*one, True, scale, form, False)
    assert scales.isnan().flatten().tolist() == bad
    for given in (None, torch.full((3,), 0.05, device=device)):
        _, scales = launch.linear_heads_quant(*one, 3, 2, 3, form, given, False)
        assert scales.isnan().any(dim=(0, 2, 4)).flatten().tolist() == bad


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [197, 900, 4000, 20_000])
def test_shipped_tiles_at_the_shapes_of_a_vit_l(rows: int, form: str, shipped: None, device: torch.device) -> None:
    scale = torch.tensor([0.0213], device=device)
    exact = form == "int8"
    for fast in (False, True) if form == "fp8" else (False,):
        one = layer(form, rows, 1024, 1024, device)
        residual = torch.randn(rows, 1024, device=device, dtype=torch.bfloat16)
        check(launch.linear(*one, False, torch.bfloat16, fast), one.product().bfloat16(), exact)
        found = launch.linear_residual(*one, residual, None, fast)
        check(found, reference.with_residual(one.product(), residual, None), exact)
        one = layer(form, rows, 1024, 4096, device)
        codes, _ = launch.linear_quant(*one, True, scale, form, fast)
        expected, _ = reference.requantized(reference.gelu(one.product()), one.scale, scale, form)
        check_codes(codes, expected, least=0.9999)
        vectors = columns(4096, device)
        codes, _ = launch.linear_quant(*one, True, scale, form, fast, *vectors)
        y = reference.gelu(one.product())
        check_codes(codes, reference.requantized(y, one.scale, scale, form, *vectors[:2])[0], least=0.9999)
        tokens = 197 if rows == 197 else 100
        one = layer(form, rows, 1024, 3072, device)
        y = reference.heads_first(one.product(), tokens, 16, 3)
        check(launch.linear_heads(*one, tokens, 16, 3, torch.bfloat16, fast), y.bfloat16(), exact)
        codes, scales = launch.linear_heads_quant(*one, tokens, 16, 3, form, None, fast)
        expected, expected_scales = reference.quantized_heads(y, form, None)
        close_scales(scales, expected_scales, exact)
        check_codes(codes, expected, least=1.0)


@pytest.mark.gpu
def test_full_sums_are_better_than_fast_ones(device: torch.device) -> None:
    """K = 4,096, positive operands, which strain short sums most."""
    q, scale = quantize(torch.rand(256, 4096, device=device), "fp8")
    weight, weight_scale = quantize(torch.rand(256, 4096, device=device), "fp8")
    exact = (q.double() @ weight.double().T) * scale.double() * weight_scale.double().T
    errors = [
        float((launch.linear(q, scale, weight, weight_scale, None, False, torch.float32, fast) - exact).norm())
        for fast in (True, False)
    ]
    assert errors[1] <= errors[0]
    assert errors[1] < 1e-3 * float(exact.norm())


@pytest.mark.gpu
def test_in_a_cuda_graph(device: torch.device) -> None:
    one, scale = layer("int8", 197, 192, 768, device), torch.tensor([0.02], device=device)
    out = torch.empty(197, 192, device=device)
    second = layer("int8", 197, 768, 192, device)

    def work() -> None:
        codes, scales = launch.linear_quant(*one, True, scale, "int8", False)
        out.copy_(launch.linear(codes, scales, *second[2:], False, torch.float32, False))

    work()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    fresh, fresh_scale = quantize(torch.randn(197, 192, device=device), "int8")
    one.q.copy_(fresh)
    one.scale.copy_(fresh_scale)
    work()
    expected = out.clone()
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("rows", TOKENS)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gelu_of_a_layer_in_16_bits(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, bias = torch.randn(rows, inputs, device=device).to(dtype), torch.randn(outputs, device=device).to(dtype)
    weight = (torch.randn(outputs, inputs, device=device) / inputs**0.5).to(dtype)
    expected = torch.nn.functional.gelu(x.double() @ weight.double().T + bias.double())
    found = launch.half_gelu(x, weight, bias)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding / 16)
