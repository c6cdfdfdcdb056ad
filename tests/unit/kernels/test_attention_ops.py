"""The attention and int4 operators as they run without a GPU: their definitions, as custom operators, and refusals.

Shapes: B batch, H heads, N tokens, E head width, M rows, K inputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels import attention_values, capability
from vit_efficient.kernels.fp8_attention import reference as fp8
from vit_efficient.kernels.fp8_attention.op import fp8_attend
from vit_efficient.kernels.int4_linear import reference as int4
from vit_efficient.kernels.int4_linear.op import int4_linear, int4_linear_codes
from vit_efficient.kernels.int8_attention import reference as int8
from vit_efficient.kernels.int8_attention.op import int8_attend
from vit_efficient.kernels.int8_linear import reference as int8_linear
from vit_efficient.kernels.int8_linear.packing import pack
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization.int8_deployed import DeployedInt8

TOKENS = (1, 63, 196, 197, 198, 257, 577)


def operands(tokens: int = 63, width: int = 64, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    qkv = torch.randn(2, tokens, 3, heads, width, generator=torch.Generator().manual_seed(tokens))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def shared_outliers(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """One channel of queries and keys three times as large as the rest."""
    q, k, v = (x.clone() for x in operands(tokens, width))
    q[..., 3] *= 3
    k[..., 3] *= 3
    return q, k, v


def sporadic_outliers(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """One number in a thousand ten times as large: FlashAttention-3, section 4.3."""
    generator = torch.Generator().manual_seed(0)

    def spoil(x: Tensor) -> Tensor:
        hit = torch.rand(x.shape, generator=generator) < 1e-3
        return x + 10 * torch.randn(x.shape, generator=generator) * hit

    q, k, v = operands(tokens, width)
    return spoil(q), spoil(k), v


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def exactly(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("values", ["int8", "float", "fp8"])
@pytest.mark.parametrize("keys", ["token", "block"])
def test_int8_is_float64_on_the_dequantized(tokens: int, values: str, keys: str) -> None:
    q, k, v = operands(tokens)
    found = int8_attend(q, k, v, scale=0.125, values=values, keys=keys)  # type: ignore[arg-type]
    rounded = [int8_linear.dequantize_rows(*int8.quantize(x)) for x in (q, k, v)]
    if keys == "block":
        codes, scale = attention_values.quantize_blocks(k, integer=True)
        rounded[1] = attention_values.dequantize_blocks(codes, scale)
    if values != "int8":
        rounded[2] = v
    bound = 5e-2 if values == "fp8" else 1e-6
    assert error(found, exactly(*rounded, 0.125)) < bound  # type: ignore[arg-type]
    assert found.transpose(1, 2).is_contiguous()


def test_forms_of_operands_agree() -> None:
    q, k, v = operands(197)
    own = int8_attend(q, k, v, scale=0.125)
    codes = [int8.quantize(x) for x in (q, k, v)]
    given = int8_attend(*(c for c, _ in codes), *(s for _, s in codes), scale=0.125)  # type: ignore[call-arg, misc]
    assert torch.equal(given, own)
    assert torch.equal(own, int8.int8_attention(q, k, v, scale=0.125))
    out_scale = torch.tensor(0.02)
    out = int8_attend(q, k, v, scale=0.125, out_scale=out_scale)
    assert out.dtype == torch.int8
    assert torch.equal(out.float(), (own / out_scale).round().clamp(-127, 127))


def test_scale_of_a_whole_tensor() -> None:
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(int8.quantize_tensor_scale(x), int8.quantize_tensor(x)[1].flatten()[0])
    x[0, 0, 0, 0] = torch.inf
    assert int8.quantize_tensor_scale(x).isnan()


@pytest.mark.parametrize("tokens", [1, 128, 129, 300])
@pytest.mark.parametrize("integer", [False, True])
def test_one_scale_a_block(tokens: int, integer: bool) -> None:
    x = torch.randn(2, 3, tokens, 16) * torch.arange(1, tokens + 1)[:, None]
    codes, scale = attention_values.quantize_blocks(x, integer=integer)
    assert scale.shape == (2, 3, -(-tokens // 128))
    largest = 127 if integer else 448
    for block, own in enumerate(scale.unbind(-1)):
        part = x[:, :, block * 128 : (block + 1) * 128]
        assert torch.equal(own, part.abs().amax((-2, -1)) / torch.tensor(float(largest)))
        assert (codes[:, :, block * 128 : (block + 1) * 128].float().abs().amax((-2, -1)) == largest).all()
    assert error(attention_values.dequantize_blocks(codes, scale), x) < (0.02 if integer else 0.04)
    x[1, 2, tokens - 1, 3] = torch.nan
    assert attention_values.quantize_blocks(x, integer=integer)[1].isnan().nonzero().tolist() == [[1, 2, tokens // 129]]


@pytest.mark.parametrize("width", [16, 27, 64, 72, 80, 96, 128])
def test_rotation_is_orthogonal_and_of_ones(width: int) -> None:
    r = fp8.rotation(width)
    padded = fp8.rotated_width(width)
    assert r.shape == (width, padded)
    assert padded & (padded - 1) == 0
    assert width <= padded < 2 * width
    assert torch.equal(r.abs(), torch.ones_like(r))
    assert torch.equal(r @ r.T, padded * torch.eye(width))
    assert torch.equal(r, fp8.rotation(width))


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("tokens", TOKENS)
def test_fp8_is_float64_on_its_logits(tokens: int, width: int) -> None:
    q, k, v = operands(tokens, width)
    for rotated in (False, True):
        p = fp8.logits(fp8.operands(q, k, rotated=rotated), 0.125).double().softmax(-1)
        assert error(fp8_attend(q, k, v, scale=0.125, rotated=rotated), p @ v.double()) < 1e-6
        assert error(fp8_attend(q, k, v, scale=0.125, rotated=rotated, values="fp8"), p @ v.double()) < 5e-2


@pytest.mark.parametrize("width", [64, 80, 128])
def test_rotation_spreads_outliers(width: int) -> None:
    """Against float attention: with such outliers the rotated form errs less; without, no more."""
    scale = width**-0.5
    for make, factor in ((shared_outliers, 0.8), (sporadic_outliers, 0.9), (operands, 1.1)):
        q, k, v = make(577, width)
        errors = {r: error(fp8_attend(q, k, v, scale=scale, rotated=r), exactly(q, k, v, scale)) for r in (False, True)}
        assert errors[True] < factor * errors[False], (make.__name__, errors)


@pytest.mark.parametrize("values", ["float", "fp8"])
def test_e4m3_keeps_a_query_without_keys_and_large_logits(values: str) -> None:
    s = torch.randn(1, 1, 5, 200) * 100
    s[0, 0, 2] = -torch.inf
    v = torch.randn(1, 1, 200, 16)
    y = attention_values.weigh(s, v)
    assert (y[0, 0, 2] == 0).all()
    p = s.double().softmax(-1).nan_to_num(0)
    assert error(y, p @ v.double()) < 5e-2


def quantized(inputs: int = 100, group: int = 32, zero: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    weight = torch.randn(24, inputs, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(weight_bits=4, group=group, zero_point=zero, activations="none")
    if not zero:
        codes, scale = int8_linear.quantize_weight(weight, scheme)
        return pack(codes), scale.bfloat16(), None
    scale, zeros = int8_linear.weight_range(weight, scheme)
    codes, _ = int8_linear.quantize_weight(weight, scheme, scale, zeros)
    offsets = zeros.to(torch.int8).repeat_interleave(group, dim=1)[:, :inputs]
    return pack(codes, offsets), scale.bfloat16(), zeros.to(torch.uint8)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("activations", ["none", "token"])
def test_int4_is_what_the_deployed_layer_computes(activations: Any, group: int, zero: bool) -> None:
    packed, scale, zeros = quantized(100, group, zero)
    layer = DeployedInt8((24, 100), True, Scheme(weight_bits=4, group=group, zero_point=zero, activations=activations))
    layer.weight, layer.weight_scale, layer.weight_zero = packed, scale, zeros  # type: ignore[assignment]
    layer.bias = torch.randn(24)
    x = torch.randn(2, 7, 100)
    for dtype in (torch.float32, torch.bfloat16):
        found = int4_linear(x, packed, scale, zeros, layer.bias, group=group, activations=activations, dtype=dtype)
        assert torch.equal(found, layer.multiply(x, dtype))
    weight = int4.codes_of(packed, zeros, 100, group).double() * scale.double().repeat_interleave(group, 1)[:, :100]
    bound = 1e-6 if activations == "none" else 2e-2
    found = int4_linear(x, packed, scale, zeros, None, group=group, activations=activations, dtype=torch.float32)
    assert error(found, x.double() @ weight.T) < bound


@pytest.mark.parametrize(("activations", "bits"), [("token", 8), ("token", 4), ("static", 8), ("tensor", 8)])
def test_int4_from_codes_is_the_layer_of_whatever_made_them(activations: Any, bits: Any) -> None:
    packed, scale, zeros = quantized(100, 32)
    scheme = Scheme(weight_bits=4, activation_bits=bits, group=32, zero_point=True, activations=activations)
    layer = DeployedInt8((24, 100), True, scheme)
    layer.weight, layer.weight_scale, layer.weight_zero = packed, scale, zeros  # type: ignore[assignment]
    layer.bias = torch.randn(24)
    if activations == "static":
        layer.input_scale = torch.tensor(0.02)
    x = torch.randn(2, 7, 100)
    codes, scales = layer.codes(x)
    scales = scales if scales.numel() == 1 else scales.view(2, 7, 1)
    for dtype in (torch.float32, torch.bfloat16):
        found = int4_linear_codes(codes.view(x.shape), scales, packed, scale, zeros, layer.bias, group=32, dtype=dtype)
        assert torch.equal(found, layer.multiply(x, dtype))
        assert torch.equal(found, layer._multiply_packed(x, dtype))  # the way of a GPU


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each operator with arguments as `torch.library.opcheck` wants them."""
    q, k, v = operands(33, 32)
    ops = torch.ops.vit_efficient
    one, f32 = torch.tensor(0.02), torch.float32
    codes = [int8.quantize(x) for x in (q, k, v)]
    packed, scale, zeros = quantized()
    x = torch.randn(5, 100)
    return {
        "int8": (ops.int8_attend, (q, k, v, None, None, None, 0.2, "int8", "token", None, torch.bfloat16)),
        "int8 static": (ops.int8_attend, (q, k, v, one, one, one, 0.2, "int8", "token", one, f32)),
        "int8 codes": (
            ops.int8_attend,
            (*(c for c, _ in codes), *(s for _, s in codes), 0.2, "int8", "token", None, f32),
        ),
        "int8 e4m3": (ops.int8_attend, (q, k, v, None, None, None, 0.2, "fp8", "block", None, f32)),
        "fp8": (ops.fp8_attend, (q, k, v, 0.2, True, "fp8", None, torch.bfloat16)),
        "fp8 out": (ops.fp8_attend, (q, k, v, 0.2, False, "float", one, f32)),
        "int4": (ops.int4_linear, (x, packed, scale, zeros, torch.randn(24), 32, "none", torch.bfloat16)),
        "int4 token": (ops.int4_linear, (x, packed, scale, zeros, None, 32, "token", f32)),
        "int4 strided": (ops.int4_linear, (torch.randn(100, 5).t(), packed, scale, zeros, None, 32, "token", f32)),
        "int4 codes": (
            ops.int4_linear_codes,
            (*int8_linear.quantize_rows(x), packed, scale, zeros, torch.randn(24), 32, torch.bfloat16),
        ),
        "int4 codes under one scale": (
            ops.int4_linear_codes,
            (
                torch.randint(-127, 128, (100, 5), dtype=torch.int8).t(),
                one.view(1, 1),
                packed,
                scale,
                None,
                None,
                32,
                f32,
            ),
        ),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_operators_keep_the_rules_of_operators(name: str) -> None:
    op, arguments = calls()[name]
    torch.library.opcheck(op.default, arguments)


def test_operators_compile_into_one_graph() -> None:
    q, k, v = operands(33, 32)
    packed, scale, zeros = quantized()
    forms = {
        "int8": partial(int8_attend, scale=0.2),
        "fp8": partial(fp8_attend, scale=0.2, values="fp8"),
    }
    for form in forms.values():
        compiled = torch.compile(lambda *x, form=form: form(*x).flatten(2) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), form(q, k, v).flatten(2) + 1)
    linear = partial(int4_linear, group=32, dtype=torch.float32)
    compiled = torch.compile(lambda x: linear(x, packed, scale, zeros, None) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 100)
    assert torch.equal(compiled(x), linear(x, packed, scale, zeros, None) * 2)


def test_no_tokens_no_images_no_rows() -> None:
    packed, scale, zeros = quantized()
    assert int4_linear(torch.randn(0, 100), packed, scale, zeros, None, group=32, dtype=torch.float32).shape == (0, 24)
    q, k, v = (x[:0] for x in operands(5, 32))
    assert int8_attend(q, k, v, scale=0.2).shape == (0, 3, 5, 32)


@pytest.mark.parametrize(
    ("chip", "fp8_missing", "triton_missing"),
    [
        ((7, 5), True, True),
        ((8, 0), True, False),
        ((8, 6), True, False),
        ((8, 9), False, False),
        ((9, 0), False, False),
    ],
)
def test_what_a_gpu_lacks(
    chip: tuple[int, int], fp8_missing: bool, triton_missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capability, "compute_capability", lambda index: chip)
    monkeypatch.setattr(capability, "has_triton", lambda: True)
    device = torch.device("cuda", 0)
    assert (capability.lacks_triton(device) is not None) == triton_missing
    reason = capability.lacks_fp8(device)
    assert (reason is not None) == fp8_missing
    if reason is not None:
        assert f"sm_{chip[0]}{chip[1]} has no fp8 matrix units" in reason
        assert "Ampere has none" in reason
    monkeypatch.setattr(capability, "has_triton", lambda: False)
    assert capability.lacks_triton(device) == "the package triton is not installed."


def test_heads_too_wide_are_named() -> None:
    q, k, v = operands(5, 160)
    assert capability.too_wide("The kernel", q, v) == "The kernel has heads up to 128 wide, and these are 160."
    assert int8_attend(q, k, v, scale=0.1).shape == q.shape  # the definition has no limit


@pytest.mark.parametrize("attend", [int8_attend, fp8_attend])
def test_operands_that_do_not_fit_are_refused_before_a_kernel_runs(attend: Any) -> None:
    q, k, v = operands(5, 16)
    for misfits in (
        (q, k[:, :2], v[:, :2]), (q, k, v[:, :2]), (q[:1], k, v), (q, k[:, :, :4], v), (q, k, v[:, :, :4]),
        (q[..., :8], k, v), (q[0], k[0], v[0]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="attention: queries"):
            attend(*misfits, scale=0.25)
    assert attend(q[:, :, :2], k, v[..., :8], scale=0.25).shape == (2, 3, 2, 8)
    compiled = torch.compile(partial(attend, scale=0.25), backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(q, k, v), attend(q, k, v, scale=0.25))


def test_scales_of_other_shapes_are_refused() -> None:
    codes, scales = zip(*(int8.quantize(x) for x in operands(5, 16)), strict=True)
    for index, word in enumerate(("queries", "keys", "values")):
        wrong = [scale[:, :1] if index == place else scale for place, scale in enumerate(scales)]
        with pytest.raises(ValueError, match=f"{word} are .* and their scales"):
            int8_attend(*codes, *wrong, scale=0.25)
    assert int8_attend(*codes, *scales, scale=0.25).shape == (2, 3, 5, 16)
