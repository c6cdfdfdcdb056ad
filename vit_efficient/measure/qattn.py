"""The matrix products of QAttn's figure 1 (section 4.2): float32 by PyTorch against int8, dynamic and static.

The linear layers of ViT-B/16 at 224 pixels and of ViT-L/32 at 384, at 1 to 2,048 images. As there, the dynamic form
takes float16 and quantizes it within the time that is measured, the static form has int8 codes on both sides, and all
are counted with the operations of the float product. float16 by PyTorch stands beside them; TensorRT and TVM, which the
figure has too, are not here.

Shapes: M rows (images times tokens), K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear

from vit_efficient.kernels.cases import block_layers, codes
from vit_efficient.kernels.linear import op
from vit_efficient.kernels.quantize.op import quantize
from vit_efficient.kernels.tuning import Shape
from vit_efficient.measure.roofline import Kind

# name: (tokens of an image, width, width inside the MLP)
MODELS = {"ViT-B/16/224": (197, 768, 3072), "ViT-L/32/384": (145, 1024, 4096)}
BATCHES = (1, 32, 64, 128, 256, 512, 1024, 2048)

# Kind of the numbers multiplied, bytes of an element in, of the weight, and out, and what is timed.
Variant = tuple[Kind, tuple[int, int, int], Callable[[], object]]


def shapes() -> Iterator[tuple[str, str, int, Shape]]:
    """Model, layer, images and product of each group of bars."""
    for model, (tokens, width, hidden) in MODELS.items():
        for batch in BATCHES:
            for layer, (_, shape) in block_layers("int8_linear", batch, tokens, width, hidden).items():
                yield model, layer, batch, shape


def variants(shape: Shape, device: torch.device) -> dict[str, Variant]:
    """The bars of one group."""
    x_MK = torch.randn(shape.rows, shape.inputs, device=device)
    w_NK = torch.randn(shape.outputs, shape.inputs, device=device) / shape.inputs**0.5
    bias_N = torch.randn(shape.outputs, device=device)
    half = tuple(each.half() for each in (x_MK, w_NK, bias_N))
    w_codes, w_scale = quantize(w_NK)
    x_codes = codes(shape.rows, shape.inputs, "int8", device)
    one = torch.full((1, 1), 0.03, device=device)

    def dynamic() -> object:
        return op.linear(*quantize(half[0]), w_codes, w_scale, bias_N, dtype=torch.float16)

    def static() -> object:
        return op.linear_quant(x_codes, one, w_codes, w_scale, bias_N, one.view(1), form="int8")

    return {
        "fp32": ("fp32", (4, 4, 4), lambda: linear(x_MK, w_NK, bias_N)),
        "fp16": ("half", (2, 2, 2), lambda: linear(*half)),
        "int8 dynamic": ("int8", (2, 1, 2), dynamic),
        "int8 static": ("int8", (1, 1, 1), static),
    }
