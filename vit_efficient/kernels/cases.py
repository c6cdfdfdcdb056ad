"""Random operands for each form of a linear layer, to time it with, and which forms models call at which shapes.

Shapes as in `kernels.linear.op` and `kernels.int4_linear.op`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vit_efficient.errors import UserError
from vit_efficient.kernels.formats import FORMATS
from vit_efficient.kernels.int4_linear.op import int4_linear
from vit_efficient.kernels.int4_linear.reference import Activations
from vit_efficient.kernels.linear import op
from vit_efficient.kernels.tuning import Shape

OPS = ("int8_linear", "fp8_linear", "fp8_linear_fast", "int4_linear")
FORMS = ("plain", "gelu", "gelu_quant", "quant", "residual", "heads", "heads_quant")
INT4_FORMS = ("plain", "token")  # bfloat16 activations; int8 ones, quantized in the call
HEAD_WIDTH = 64
INT4_GROUP = 64  # inputs that share a scale and a zero point, as in the recipe int4_group_sdpa


def forms_of(operator: str) -> tuple[str, ...]:
    """The forms that an operator has."""
    return INT4_FORMS if operator == "int4_linear" else FORMS


def tile_name(operator: str, form: str) -> str:
    """What tiles of a form are looked up under; all forms of `int4_linear` share theirs."""
    return operator if operator == "int4_linear" else f"{operator}.{form}"


class Layer(NamedTuple):
    """A linear layer of a block."""

    forms: tuple[str, ...]
    shape: Shape


def codes(rows: int, columns: int, form: str, device: torch.device) -> Tensor:
    """Codes as quantized normal numbers have them."""
    chosen = FORMATS[form]
    x = torch.randn(rows, columns, device=device) * (chosen.largest / 4)
    x = x.clamp(-chosen.largest, chosen.largest)
    return (x.round() if chosen.is_integer else x).to(chosen.dtype)


def block_layers(operator: str, batch: int, tokens: int, width: int, hidden: int) -> dict[str, Layer]:
    """The four linear layers of a transformer block: the forms that deployed models call them in, and their shapes.

    A fused block (`model.fused`) calls qkv plain, or with codes laid out for integer attention; fc1 with GELU where
    scales are dynamic, with GELU and codes where fc2 has a given one (static, hybrid).
    """
    rows = batch * tokens
    int4 = operator == "int4_linear"

    def layer(inputs: int, outputs: int, *forms: str) -> Layer:
        return Layer(("plain",) if int4 else forms, Shape(rows, inputs, outputs))

    return {
        "qkv": layer(width, 3 * width, "plain", "heads_quant"),
        "proj": layer(width, width, "residual"),
        "fc1": layer(width, hidden, "gelu", "gelu_quant"),
        "fc2": layer(hidden, width, "residual"),
    }


def check_heads(form: str, shape: Shape, head_width: int = HEAD_WIDTH) -> None:
    """Refuse a shape whose outputs are not whole heads, where a form lays out heads.

    Raises:
        UserError: it is such a shape.
    """
    if form.startswith("heads") and (shape.outputs < 1 or shape.outputs % (3 * head_width)):
        raise UserError(
            f"{form} at {shape}: {shape.outputs} outputs are not queries, keys and values of heads that are "
            f"{head_width} wide. Take a multiple of {3 * head_width} outputs (a --width that is a multiple of "
            f"{head_width})."
        )


def linear_case(
    operator: str,
    form: str,
    shape: Shape,
    device: torch.device,
    *,
    tokens: int | None = None,
    head_width: int = HEAD_WIDTH,
    smoothed: bool = False,
) -> Callable[[], object]:
    """A call of one form at one shape, scales a row and a column, bias, bfloat16 where it is not codes.

    Args:
        operator: one of `OPS`.
        form: one of `forms_of` it.
        shape: of the product.
        device: where.
        tokens: rows of an image, where the form lays out heads; None: all rows.
        head_width: columns of a head there.
        smoothed: whether codes of the output are made after a shift and a smoothing of each column, where codes are
            made under a given scale.
    """
    if form not in forms_of(operator):
        raise ValueError(f"{operator} has no form {form!r}; it has {', '.join(forms_of(operator))}")
    check_heads(form, shape, head_width)
    if operator == "int4_linear":
        return _int4_case(form, shape, device)
    kind = operator.partition("_")[0]
    accumulation: op.Accumulation = "fast" if operator.endswith("_fast") else "full"
    q = codes(shape.rows, shape.inputs, kind, device)
    weight = codes(shape.outputs, shape.inputs, kind, device)
    scale = torch.rand(shape.rows, 1, device=device) / 100
    weight_scale = torch.rand(shape.outputs, 1, device=device) / 100
    bias = torch.randn(shape.outputs, device=device)
    operands = (q, scale, weight, weight_scale, bias)
    bf16 = torch.bfloat16
    if form in ("plain", "gelu"):
        return lambda: op.linear(*operands, dtype=bf16, gelu=form == "gelu", accumulation=accumulation)
    if form in ("quant", "gelu_quant"):
        given, gelu = torch.tensor([0.05], device=device), form == "gelu_quant"
        vectors: dict[str, Tensor] = {}
        if smoothed:
            shift_N, smooth_N = (
                torch.randn(shape.outputs, device=device),
                torch.rand(shape.outputs, device=device) + 0.5,
            )
            vectors = {"shift_N": shift_N, "smooth_N": smooth_N, "reciprocal_N": 1 / smooth_N}
        return lambda: op.linear_quant(*operands, given, form=kind, gelu=gelu, accumulation=accumulation, **vectors)
    if form == "residual":
        residual = torch.randn(shape.rows, shape.outputs, device=device, dtype=bf16)
        return lambda: op.linear_residual(*operands, residual, accumulation=accumulation)
    q3 = q.view(-1, tokens or shape.rows, shape.inputs)
    by_image = (q3, scale, *operands[2:])
    heads = shape.outputs // (3 * head_width)
    if form == "heads":
        return lambda: op.linear_heads(*by_image, heads, dtype=bf16, accumulation=accumulation)
    return lambda: op.linear_heads_quant(*by_image, heads, accumulation=accumulation)  # int8, whatever is multiplied


def _int4_case(form: str, shape: Shape, device: torch.device) -> Callable[[], object]:
    bf16, groups = torch.bfloat16, -(-shape.inputs // INT4_GROUP)
    x = torch.randn(shape.rows, shape.inputs, device=device, dtype=bf16)
    packed = torch.randint(256, (shape.outputs, -(-shape.inputs // 2)), device=device, dtype=torch.uint8)
    scale = (torch.rand(shape.outputs, groups, device=device) / 100).to(bf16)
    zero = torch.randint(16, (shape.outputs, groups), device=device, dtype=torch.uint8)
    bias = torch.randn(shape.outputs, device=device, dtype=bf16)
    activations: Activations = "token" if form == "token" else "none"
    return lambda: int4_linear(
        x, packed, scale, zero, bias, group=INT4_GROUP, activations=activations, dtype=bf16
    )  # fmt: skip
