"""Mixed-precision attention against exact integers, float64 softmax, and autograd of the float attention it stands for.

Shapes: B batch, H heads, N queries, M keys, E width of queries and keys, F width of values.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int8_attention import op, reference
from vit_efficient.kernels.int8_attention.reference import Keys, Values

TOKENS = (1, 63, 196, 197, 198, 257)
WIDTHS = (32, 64, 80, 88)
Operands = tuple[Tensor, Tensor, Tensor]


def operands(tokens: int = 63, width: int = 32, *, size: float = 1.0, seed: int = 0) -> Operands:
    """Queries, keys and values, views of one projection as an attention module makes them: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(2, tokens, 3 * 3 * width, generator=generator) * size
    q, k, v = qkv.unflatten(-1, (3, 3, width)).permute(2, 0, 3, 1, 4).unbind(0)
    assert tokens == 1 or not q.is_contiguous()
    return q, k, v


def static_scales(*tensors: Tensor, share: float = 1.0) -> reference.Scales:
    q, k, v = (share * x.detach().abs().amax().float() / 127 for x in tensors)
    return q, k, v


def slowly(q: Tensor, k: Tensor, v: Tensor, codes: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """The definition once more: integers in int64, softmax and sums in float64."""
    (cq, sq), (ck, sk), (cv, sv) = ((c.numpy().astype(np.int64), s.double().numpy()) for c, s in codes)
    logits = (cq @ ck.swapaxes(-1, -2)) * sq * sk.swapaxes(-1, -2) * scale
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return torch.from_numpy(p / p.sum(-1, keepdims=True) @ (cv * sv))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp_min(1e-300))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward_against_integers_and_float64(tokens: int, width: int) -> None:
    x = operands(tokens, width)
    for granularity in ("token", "tensor"):
        codes = [reference.quantize(one, granularity) for one in x]
        expected = slowly(*x, codes, width**-0.5)
        for form in (reference.int8_attention, op.int8_attention):
            y = form(*x, scale=width**-0.5, granularity=granularity)
            assert y.shape == x[0].shape
            assert distance(y, expected) < 1e-6, (form.__module__, granularity)


@pytest.mark.parametrize("tokens", [196, 197, 198])
@pytest.mark.parametrize("size", [1e-3, 1e-20])
def test_small_logits_count_no_key_that_is_not_there(tokens: int, size: float) -> None:
    """With logits near 0 each key weighs 1 / N: keys of padding, at 0, would take a visible share."""
    q, k, _ = operands(tokens, 64, size=size)
    v = torch.ones(2, 3, tokens, 64)
    for form in (reference.int8_attention, op.int8_attention):
        assert (form(q, k, v, scale=0.125) - 1).abs().max() < 1e-5


def test_keys_behind_a_mask_are_as_good_as_absent() -> None:
    """Per token the scales of the others do not change, so more keys under a mask change nothing."""
    q, k, v = operands(197, 64)
    mask = torch.arange(256) < 197
    longer = F.pad(k, (0, 0, 0, 59), value=9.0), F.pad(v, (0, 0, 0, 59), value=9.0)
    for form in (reference.int8_attention, op.int8_attention):
        own, masked = form(q, k, v, scale=0.125), form(q, *longer, scale=0.125, mask=mask)
        assert distance(masked, own) < 1e-6


def test_sums_are_exact_at_their_largest_and_under_autocast() -> None:
    for width in (64, 1040, 1041, 4096):
        q_codes = torch.full((1, 1, 2, width), 127, dtype=torch.int8)
        k_codes = torch.cat((q_codes, -q_codes), dim=2)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                sums = reference.int8_matmul(q_codes, k_codes)
            assert sums.dtype == torch.int32
            assert sums[0, 0].tolist() == [[127 * 127 * width] * 2 + [-127 * 127 * width] * 2] * 2


def test_heads_too_wide_are_refused() -> None:
    wide = torch.ones(1, 1, 1, 133_145, dtype=torch.int8)
    with pytest.raises(ValueError, match="overflow"):
        reference.int8_matmul(wide, wide)


def test_logits_in_the_written_order() -> None:
    """``((sum * s_q) * s_k) * scale``, each step rounded to float32; another order differs in a last bit somewhere."""
    q, k, _ = operands(197, 64)
    (cq, sq), (ck, sk) = reference.quantize(q), reference.quantize(k)
    sums = reference.int8_matmul(cq, ck)
    ours = reference.logits(sums, sq, sk, 0.37)
    s = sums.numpy().astype(np.float32)
    written = ((s * sq.numpy()) * sk.numpy().swapaxes(-1, -2)) * np.float32(0.37)
    np.testing.assert_array_equal(ours.numpy(), written)
    other = s * (sq.numpy() * sk.numpy().swapaxes(-1, -2) * np.float32(0.37))
    assert (ours.numpy() != other).any()


def test_one_scale_a_token_and_head_or_one_in_all() -> None:
    q, _, _ = operands(63, 32)
    codes, scale = reference.quantize(q)
    assert scale.shape == (2, 3, 63, 1)
    assert torch.equal(scale, q.abs().amax(-1, keepdim=True) / torch.tensor(127.0))
    assert codes.abs().amax(-1).eq(127).all()
    codes, scale = reference.quantize(q, "tensor")
    assert (codes.shape, scale.shape) == (q.shape, (2, 3, 63, 1))
    assert scale.unique().tolist() == [float(q.abs().max() / torch.tensor(127.0))]
    assert (codes.float() * scale - q).abs().max() <= scale.max() / 2 * 1.001


def test_calibrated_scales_saturate() -> None:
    q, k, v = operands(63, 32)
    scales = static_scales(q, k, v, share=0.5)
    codes = [reference.quantize(x, scale=s) for x, s in zip((q, k, v), scales, strict=True)]
    for x, (own, scale), s in zip((q, k, v), codes, scales, strict=True):
        assert scale.shape == (2, 3, 63, 1)
        assert torch.equal(own.float(), (x / s).round().clamp(-127, 127))
        assert (x.abs() / s > 127.5).any()
    expected = slowly(q, k, v, codes, 0.2)
    for form in (reference.int8_attention, op.int8_attention):
        assert distance(form(q, k, v, scale=0.2, scales=scales), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(dtype: torch.dtype) -> None:
    """Codes are those of the values as float32; the output is rounded once."""
    x = tuple(one.to(dtype) for one in operands(197, 64))
    expected = reference.int8_attention(*(one.float() for one in x), scale=0.125)
    for y in (reference.int8_attention(*x, scale=0.125, dtype=dtype), op.int8_attention(*x, scale=0.125)):
        assert y.dtype == dtype
        assert torch.equal(y, expected.to(dtype))


def test_autocast_decides_the_dtype_alone() -> None:
    x = operands(63, 32)
    plain = op.int8_attention(*x, scale=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = op.int8_attention(*x, scale=0.2)
        defined = reference.int8_attention(*x, scale=0.2)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain.bfloat16())
    assert torch.equal(defined, plain)


def test_other_keys_than_queries_and_wider_values() -> None:
    q, k, v = torch.randn(2, 3, 1, 32), torch.randn(2, 3, 197, 32), torch.randn(2, 3, 197, 64)
    for form in (reference.int8_attention, op.int8_attention):
        y = form(q, k, v, scale=0.2)
        assert y.shape == (2, 3, 1, 64)
        assert distance(y, F.scaled_dot_product_attention(q, k, v, scale=0.2)) < 0.02


def test_a_query_that_may_look_at_no_key_gets_zeros() -> None:
    q, k, v = operands(5, 32)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for form in (reference.int8_attention, op.int8_attention):
        y = form(q, k, v, scale=32**-0.5, mask=mask)
        assert (y[:, :, 2] == 0).all()
        assert (expected[:, :, 2] == 0).all()
        assert distance(y, expected) < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    q, k, v = (x.clone() for x in operands(5, 32))
    q[0, 0, 2, 3] = bad
    for form in (reference.int8_attention, op.int8_attention):
        y = form(q, k, v, scale=0.2)
        assert y[0, 0, 2].isnan().all()
        assert y[0, 0, [0, 1, 3, 4]].isfinite().all()
        assert y[1].isfinite().all()


def dequantized(x: Tensor, granularity: str, scale: Tensor | None) -> Tensor:
    """What the codes stand for, with the gradient of a clamp and rounding's taken for 1."""
    with torch.no_grad():
        codes, rows = reference.quantize(x, granularity, scale)  # type: ignore[arg-type]
        value = codes.float() * rows
    kept = x.float() if scale is None else x.float().clamp(-127 * scale, 127 * scale)
    return kept + (value - kept).detach()


def float_attention(x: Operands, bias: Tensor | None, mask: Tensor | None, dropped: Tensor | None) -> Tensor:
    s = x[0] @ x[1].mT * 0.2
    s = s if bias is None else s + bias
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    p = s.softmax(-1) if dropped is None else s.softmax(-1) * dropped
    return p @ x[2]


@pytest.mark.parametrize("tokens", [1, 197, 257])
@pytest.mark.parametrize("form", ["token", "tensor", "static"])
@pytest.mark.parametrize("extras", [False, True])
def test_gradients_are_those_of_float_attention_on_the_dequantized(tokens: int, form: str, extras: bool) -> None:
    x = tuple(one.detach().clone().requires_grad_() for one in operands(tokens, 32))
    granularity = "token" if form == "static" else form
    scales = static_scales(*x, share=0.6) if form == "static" else None
    bias = torch.randn(1, 3, tokens, tokens, requires_grad=True) if extras else None
    mask = (torch.rand(tokens, tokens) < 0.8) | torch.eye(tokens, dtype=torch.bool) if extras else None
    leaves = [*x, *([bias] if bias is not None else [])]
    given = scales or (None, None, None)
    instead = tuple(dequantized(one, granularity, s) for one, s in zip(x, given, strict=True))
    expected = float_attention(instead, bias, mask, None)  # type: ignore[arg-type]
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    y = op.int8_attention(*x, bias=bias, mask=mask, scale=0.2, granularity=granularity, scales=scales)  # type: ignore[arg-type]
    assert distance(y, expected) < 1e-5
    got = torch.autograd.grad(y, leaves, upstream)
    for own, other in zip(got, wanted, strict=True):
        if tokens == 1 and other.abs().max() < 1e-6:  # softmax over one key has no slope
            assert own.abs().max() < 1e-6
        else:
            assert distance(own, other) < 1e-5
    if form == "static":
        assert (got[0] == 0).any()
        assert (got[0] != 0).any() or tokens == 1


def test_gradients_under_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tuple(one.detach().clone().requires_grad_() for one in operands(63, 32))
    dropped = F.dropout(torch.ones(2, 3, 63, 63), 0.3)
    instead = tuple(dequantized(one, "token", None) for one in x)
    expected = float_attention(instead, None, None, dropped)  # type: ignore[arg-type]
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, upstream)
    monkeypatch.setattr(op.F, "dropout", lambda ones, p: dropped)
    y = op.int8_attention(*x, scale=0.2, dropout=0.3)
    assert distance(y, expected) < 1e-5
    for own, other in zip(torch.autograd.grad(y, x, upstream), wanted, strict=True):
        assert distance(own, other) < 1e-5


def test_dropout_drops_and_keeps_the_mean() -> None:
    q, k, _ = operands(197, 32, size=1e-6)
    torch.manual_seed(0)
    y = op.int8_attention(q, k, torch.ones(2, 3, 197, 4), scale=0.2, dropout=0.5)
    assert y.std() > 0.01
    assert (y.mean() - 1).abs() < 0.01


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(("values", "keys"), [("float", "token"), ("fp8", "token"), ("int8", "block")])
def test_gradients_of_other_forms(values: Values, keys: Keys, extras: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight through the codes of keys and values; attention weights that the forward rounds count unrounded."""
    q, k, v = x = tuple(one.detach().clone().requires_grad_() for one in operands(197, 32))
    k_codes, k_rows = reference.quantize_keys(k, keys)
    v_value = reference.dequantize(*reference.quantize_values(v, values))
    straight = (
        dequantized(q, "token", None),
        k + (k_codes.float() * k_rows - k).detach(),
        v + (v_value - v).detach(),
    )
    dropped = F.dropout(torch.ones(2, 3, 197, 197), 0.3) if extras else None
    mask = (torch.rand(197, 197) < 0.8) | torch.eye(197, dtype=torch.bool) if extras else None
    expected = float_attention(straight, None, mask, dropped)
    if extras:
        monkeypatch.setattr(op.F, "dropout", lambda ones, p: dropped)
    y = op.int8_attention(*x, mask=mask, scale=0.2, dropout=0.3 if extras else 0.0, values=values, keys=keys)
    assert distance(y, expected) < (5e-2 if values == "fp8" else 1e-5)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, x, upstream)
    for own, other in zip(torch.autograd.grad(y, x, upstream), wanted, strict=True):
        assert distance(own, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_operand(dtype: torch.dtype) -> None:
    x = tuple(one.to(dtype).detach().requires_grad_() for one in operands(63, 32))
    single = tuple(one.detach().float().requires_grad_() for one in x)
    op.int8_attention(*x, scale=0.2).sum().backward()
    op.int8_attention(*single, scale=0.2).sum().backward()
    for half, full in zip(x, single, strict=True):
        assert half.grad is not None
        assert full.grad is not None
        assert half.grad.dtype == dtype
        assert torch.allclose(half.grad.float(), full.grad, rtol=0.02, atol=1e-3)
