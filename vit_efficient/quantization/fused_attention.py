"""Queries, keys and values as integer attention multiplies them, from the deployed projections that make them.

What becomes int8 leaves its projection in codes; values that do not become int8 leave it in the run's precision. A
fused projection is two products then, of views of its weight. In bytes for each element of a token's width, 4 are
written, 4 read by attention, and 1 more because the input's codes are read twice: 9. All three in 16 bits would be 6
written, 3 moved by the kernel that makes codes of keys, and 5 read: 14.

Shapes: B batch, H heads, N tokens, E head width, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_efficient.quantization.fused_linear import Codes, FusedLinear
from vit_efficient.quantization.int8_attention import OPERANDS, Int8Attend


def attention_operands(
    attend: Int8Attend,
    layers: Sequence[tuple[FusedLinear, Tensor | None]],
    inputs: Sequence[Codes],
    heads: int,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Queries, keys and values, each (B, H, N, E), and their scales (B, H, N, 1) where they are codes.

    Args:
        attend: says which become codes, and under which scales. Blocks of keys are none of its business: no row of a
            projection knows their scale.
        layers: the fused projection, or those of queries, keys and values; each with a bias in place of one that it
            lacks, or None.
        inputs: of each layer, codes (B, N, K).
        heads: H.
        dtype: of what does not become codes.
    """
    coded, fused = len(attend.operands), len(layers) == 1
    scales = torch.stack([*attend.buffers()]) if attend.mode == "static" else None
    spans = [(0, coded), (coded, 3)] if fused else [(part, part + 1) for part in range(3)]
    operands: list[Tensor] = []
    rows: list[Tensor | None] = []
    for index, (first, last) in enumerate(spans):
        if first == last:
            continue
        one = 0 if fused else index
        layer, bias = layers[one]
        width = layer.layer.shape[0] // len(OPERANDS)
        outputs = slice(first * width, last * width) if fused else slice(None)
        if first < coded:
            own = None if scales is None else scales[first:last]
            made = layer.output_heads(inputs[one], heads, last - first, own, bias, outputs)
            operands += made.values.unbind(0)
            rows += made.scale.unbind(0)
        else:
            operands.append(layer.output_float_heads(inputs[one], heads, dtype, bias, outputs))
            rows.append(None)
    return operands, rows
