"""Random operands for each form of a linear layer on codes, to time it with. Shapes as in `kernels.linear.op`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vit_efficient.kernels.formats import FORMATS
from vit_efficient.kernels.linear import op
from vit_efficient.kernels.tuning import Shape

OPS = ("int8_linear", "fp8_linear", "fp8_linear_fast")
FORMS = ("plain", "gelu", "gelu_quant", "quant", "residual", "heads", "heads_quant")


def codes(rows: int, columns: int, form: str, device: torch.device) -> Tensor:
    """Codes as quantized normal numbers have them."""
    chosen = FORMATS[form]
    x = torch.randn(rows, columns, device=device) * (chosen.largest / 4)
    x = x.clamp(-chosen.largest, chosen.largest)
    return (x.round() if chosen.is_integer else x).to(chosen.dtype)


def block_layers(batch: int, tokens: int, width: int, hidden: int) -> dict[str, tuple[str, Shape]]:
    """The four linear layers of a transformer block: their form in the fused block, and their shape."""
    rows = batch * tokens
    return {
        "qkv": ("heads", Shape(rows, width, 3 * width)),
        "proj": ("residual", Shape(rows, width, width)),
        "fc1": ("gelu_quant", Shape(rows, width, hidden)),
        "fc2": ("residual", Shape(rows, hidden, width)),
    }


def linear_case(
    operator: str,
    form: str,
    shape: Shape,
    device: torch.device,
    *,
    tokens: int | None = None,
    head_width: int = 64,
    smoothed: bool = False,
) -> Callable[[], object]:
    """A call of one form at one shape, scales a row and a column, bias, bfloat16 where it is not codes.

    Args:
        operator: one of `OPS`.
        form: one of `FORMS`.
        shape: of the product.
        device: where.
        tokens: rows of an image, where the form lays out heads; None: all rows.
        head_width: columns of a head there.
        smoothed: whether codes of the output are made after a shift and a smoothing of each column, where codes are
            made under a given scale.
    """
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
    if form == "heads_quant":
        return lambda: op.linear_heads_quant(*by_image, heads, form=kind, accumulation=accumulation)
    raise ValueError(f"no form of a linear layer is called {form!r}; there are {', '.join(FORMS)}")
