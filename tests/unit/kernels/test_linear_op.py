"""Linear layers on codes and their fused forms as operators, on a CPU. Shapes: B batch, T tokens, H heads, E width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.fp8_linear import reference as fp8
from vit_efficient.kernels.int8_attention import reference as attention
from vit_efficient.kernels.int8_linear import reference as int8
from vit_efficient.kernels.linear import op
from vit_efficient.kernels.quantize.op import quantize

B, T, K, H, E = 2, 5, 48, 3, 16
FORMS = ("int8", "fp8")


def operands(form: str, outputs: int = 3 * H * E) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return *quantize(torch.randn(B, T, K), form), *quantize(torch.randn(outputs, K), form), torch.randn(outputs)


def float_layer(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """The same layer in float64 on what the codes stand for."""
    return (q.double() * scale) @ (weight.double() * weight_scale).T + bias


@pytest.mark.parametrize("form", FORMS)
def test_the_layer_is_that_of_its_codes(form: str) -> None:
    one = operands(form)
    y = op.linear(*one, dtype=torch.float32)
    assert y.shape == (B, T, 3 * H * E)
    torch.testing.assert_close(y, float_layer(*one).float(), rtol=1e-5, atol=1e-5)
    gelu = op.linear(*one, dtype=torch.bfloat16, gelu=True)
    torch.testing.assert_close(gelu, F.gelu(float_layer(*one)).bfloat16(), rtol=1e-2, atol=1e-2)


def test_it_is_the_definition_of_both_layers_bit_for_bit() -> None:
    x, weight, bias = torch.randn(B, T, K), torch.randn(32, K), torch.randn(32)
    codes = *quantize(x, "int8"), *quantize(weight, "int8"), bias
    assert torch.equal(op.linear(*codes, dtype=torch.float32), int8.int8_linear(x, weight, bias))
    codes = *quantize(x, "fp8"), *quantize(weight, "fp8"), bias
    assert torch.equal(op.linear(*codes, dtype=torch.float32), fp8.fp8_linear(x, weight, bias, fp8.Scheme()))


@pytest.mark.parametrize("form", FORMS)
def test_codes_of_the_output_come_from_what_is_not_rounded_to_16_bits(form: str) -> None:
    one, scale = operands(form), torch.tensor([0.05])
    codes, scales = op.linear_quant(*one, scale, form=form, gelu=True)
    y = op.linear(*one, dtype=torch.float32, gelu=True)
    expected, expected_scales = quantize(y, form, scale)
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scales, expected_scales)
    assert scales.shape == (B, T, 1)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_codes_of_shifted_and_smoothed_columns(form: str, gelu: bool) -> None:
    """Two steps, each rounded, and not one: the codes tell."""
    one, scale = operands(form), torch.tensor([0.05])
    shift, smooth = torch.randn(3 * H * E), torch.rand(3 * H * E) + 0.1
    y = op.linear(*one, dtype=torch.float32, gelu=gelu)
    for a, b in ((shift, smooth), (shift, None), (None, smooth)):
        codes, scales = op.linear_quant(*one, scale, shift_N=a, smooth_N=b, form=form, gelu=gelu)
        changed = y if a is None else y - a
        expected, expected_scales = quantize(changed if b is None else changed / b, form, scale)
        assert torch.equal(codes.float(), expected.float())
        assert torch.equal(scales, expected_scales)
        alone, _ = quantize(y, form, scale, a, b)
        assert torch.equal(codes.float(), alone.float())
        given, _ = op.linear_quant(
            *one, scale, shift_N=a, smooth_N=b, reciprocal_N=None if b is None else 1 / b, form=form, gelu=gelu
        )
        assert torch.equal(codes.float(), given.float())


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_is_not_a_number_stays_so(form: str) -> None:
    one = operands(form)
    one[1][1, 2] = float("nan")
    _, scales = op.linear_quant(*one, torch.tensor([0.05]), form=form)
    assert scales.isnan().squeeze(-1).nonzero().tolist() == [[1, 2]]


def test_the_residual_and_layer_scale() -> None:
    one = operands("int8")
    residual, gamma = torch.randn(B, T, 3 * H * E).bfloat16(), torch.rand(3 * H * E)
    y = op.linear_residual(*one, residual, gamma)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (residual.float() + gamma * op.linear(*one, dtype=torch.float32)).bfloat16())
    plain = op.linear_residual(*one, residual)
    assert torch.equal(plain, (residual.float() + op.linear(*one, dtype=torch.float32)).bfloat16())


@pytest.mark.parametrize("parts", [1, 3])
def test_heads_lie_as_attention_reads_them(parts: int) -> None:
    one = operands("int8", parts * H * E)
    y = op.linear(*one, dtype=torch.float32)
    found = op.linear_heads(*one, H, dtype=torch.float32, parts=parts)
    assert found.is_contiguous()
    assert torch.equal(found, y.view(B, T, parts, H, E).permute(2, 0, 3, 1, 4))
    codes, scales = op.linear_heads_quant(*one, H, parts=parts)
    expected, expected_scales = attention.quantize(found, "token")
    assert torch.equal(codes, expected)
    assert torch.equal(scales, expected_scales)
    given = torch.rand(parts) / 10 + 0.01
    codes, scales = op.linear_heads_quant(*one, H, parts=parts, scales=given)
    for part in range(parts):
        assert torch.equal(codes[part], attention.quantize(found[part], scale=given[part])[0])
        assert (scales[part] == given[part]).all()


def test_codes_of_two_kinds_do_not_multiply() -> None:
    q, scale, *_ = operands("int8")
    _, _, weight, weight_scale, bias = operands("fp8")
    with pytest.raises(ValueError, match="must agree"):
        op.linear(q, scale, weight, weight_scale, bias, dtype=torch.float32)


def test_no_rows() -> None:
    q, scale, *rest = operands("int8")
    empty = q[:0], scale[:0]
    assert op.linear(*empty, *rest, dtype=torch.float32).shape == (0, T, 3 * H * E)
    assert op.linear_heads(*empty, *rest, H, dtype=torch.float32).shape == (3, 0, H, T, E)


def flat(form: str) -> list[Any]:
    q, scale, weight, weight_scale, bias = operands(form)
    return [q.reshape(-1, K), scale.reshape(-1, 1), weight, weight_scale, bias]


CASES: list[tuple[Any, list[Any]]] = [
    (op.linear_of_codes, [True, torch.bfloat16, False]),
    (op._linear_quant, [True, torch.tensor([0.05]), None, None, None, "int8", False]),
    (op._linear_quant, [False, torch.tensor([0.05]), *torch.rand(3, 3 * H * E).add(0.1).unbind(), "int8", False]),
    (op._linear_residual, [torch.randn(B * T, 3 * H * E), torch.rand(3 * H * E), False]),
    (op._linear_heads, [T, H, 3, torch.float32, True]),
    (op._linear_heads_quant, [T, H, 3, "int8", None, False]),
    (op._linear_heads_quant, [T, H, 3, "fp8", torch.rand(3) + 0.1, False]),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_operators_keep_pytorchs_rules(case: int) -> None:
    operator, rest = CASES[case]
    torch.library.opcheck(operator, (*flat("int8"), *rest))
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # The check of the schema compares inputs before and after, which PyTorch cannot do with e4m3.
    torch.library.opcheck(operator, (*flat("fp8"), *rest), test_utils=others)
    for form in FORMS:  # strides change nothing in what is returned
        strided = [transposed(x) if isinstance(x, Tensor) and x.ndim == 2 else x for x in (*flat(form), *rest)]
        torch.library.opcheck(operator, tuple(strided), test_utils=others)


def transposed(x: Tensor) -> Tensor:
    """The same matrix, its columns contiguous."""
    return x.t().contiguous().t()


@pytest.mark.parametrize("form", FORMS)
def test_no_inputs_leave_the_bias(form: str) -> None:
    q, scale, weight, weight_scale, bias = operands(form)
    y = op.linear(q[..., :0], scale, weight[:, :0], weight_scale, bias, dtype=torch.float32)
    assert torch.equal(y, bias.expand_as(y))
    assert op.linear(q, scale, weight[:0], weight_scale[:0], bias[:0], dtype=torch.float32).shape == (B, T, 0)


def test_forms_compile_without_a_break() -> None:
    one, residual, scale = operands("int8"), torch.randn(B, T, 3 * H * E), torch.tensor([0.05])

    def block(q: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        heads, head_scales = op.linear_heads_quant(q, s, *one[2:], H)
        smooth = torch.full((3 * H * E,), 0.7)
        codes, scales = op.linear_quant(q, s, *one[2:], scale, gelu=True, shift_N=smooth, smooth_N=smooth)
        return heads, head_scales, codes, scales, op.linear_residual(q, s, *one[2:], residual)

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(*one[:2]), block(*one[:2]), strict=True):
        assert torch.equal(found, expected)


MISFITS: list[tuple[str, Any]] = [
    ("48 outputs are not 3 parts of 5 heads", lambda q, s, w, ws, b: op.linear_heads(q, s, w, ws, b, 5, dtype=q.dtype)),
    ("48 outputs are not 3 parts of 0 heads", lambda *one: op.linear_heads_quant(*one, 0)),
    (r"scales of parts are \(2,\)", lambda *one: op.linear_heads_quant(*one, 1, scales=torch.ones(2))),
    (r"laid out of \(\.\.\., T, K\)", lambda q, s, *rest: op.linear_heads_quant(q[0, 0], s[0, 0], *rest, 1)),
    (r"residual is \(2, 5, 49\)", lambda *one: op.linear_residual(*one, torch.ones(B, T, 49))),
    (r"residual is \(1, 5, 48\)", lambda *one: op.linear_residual(*one, torch.ones(1, T, 48))),
    (r"layer scale is \(3,\)", lambda *one: op.linear_residual(*one, torch.ones(B, T, 48), torch.ones(3))),
    ("scales of codes are", lambda q, s, *rest: op.linear(q, s[:1], *rest, dtype=torch.float32)),
    (
        "scales of the weight are",
        lambda q, s, w, ws, b: op.linear_quant(q, s, w, ws[:7], b, torch.ones(1)),
    ),
    (r"bias is \(7,\)", lambda q, s, w, ws, b: op.linear_quant(q, s, w, ws, b[:7], torch.ones(1))),
    (r"shift is \(7,\)", lambda *one: op.linear_quant(*one, torch.ones(1), shift_N=torch.ones(7))),
    (r"scale of the output is \(2,\)", lambda *one: op.linear_quant(*one, torch.ones(2))),
    ("inputs differ", lambda q, s, *rest: op.linear(q[..., :7], s, *rest, dtype=torch.float32)),
]


@pytest.mark.parametrize(("text", "call"), MISFITS, ids=[text for text, _ in MISFITS])
def test_shapes_that_do_not_fit_are_refused_before_a_kernel_runs(text: str, call: Any) -> None:
    with pytest.raises(ValueError, match=text):
        call(*operands("int8", 48))


@pytest.mark.parametrize("images", [1, 4])
def test_checks_say_nothing_of_the_number_of_images(images: int) -> None:
    """Also of rows (B, K), with a scale each or one in all: a program for 1 to 64 images is one program."""

    class Head(torch.nn.Module):
        def forward(self, q: Tensor, scale: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
            rest = torch.ones(6, K, dtype=torch.int8), torch.ones(6, 1), torch.ones(6)
            residual = torch.ones(q.shape[0], 6)
            return op.linear(q, one, *rest, dtype=torch.float32), op.linear_residual(q, scale, *rest, residual)

    inputs = torch.ones(images, K, dtype=torch.int8), torch.ones(images, 1), torch.ones(1, 1)
    batch = torch.export.Dim("batch", min=1, max=64)
    if images > 1:  # PyTorch takes an example of 1 for a constant
        exported = torch.export.export(Head(), inputs, dynamic_shapes=({0: batch}, {0: batch}, None)).module()
        for count in (1, 64):
            given = torch.ones(count, K, dtype=torch.int8), torch.ones(count, 1), inputs[2]
            assert exported(*given)[0].shape == (count, 6)
    compiled = torch.compile(Head(), backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(*inputs)[0], Head()(*inputs)[0])
