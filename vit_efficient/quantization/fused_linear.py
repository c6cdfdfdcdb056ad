"""What a deployed layer offers to a fused block: its input quantized where it is made, its output used where it falls.

A fused block quantizes a tensor once, hands the codes from layer to layer, and lets each product end in what follows it
(residual, GELU, the next layer's codes). `FusedLinear` is a view of one deployed layer for that; it holds the layer and
nothing of its own, so weights and scales follow the layer to its device.

4-bit weights: in groups they stay packed, and on a GPU the kernel unpacks them in registers (`int4_linear`). With one
scale a row they are multiplied as 8-bit ones are, and all that may follow in one pass follows them too; for that the
layer keeps their codes as bytes from when it is fused (`DeployedInt8.keep_unpacked`), which takes N x K bytes more.

On a CPU every step is the arithmetic of the layers run one by one, in the same order: fused and unfused models agree
bit for bit in float32. On a GPU the steps are kernels: codes lie within one of those, seldom anywhere but next to the
middle between two, since a norm adds in another order and nothing is rounded to 16 bits on the way.

Shapes: M tokens (all leading dimensions flattened), K inputs, N outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vit_efficient.kernels.formats import FormatName
from vit_efficient.kernels.int8_linear import op as int8
from vit_efficient.kernels.linear import op as linear
from vit_efficient.kernels.quantize import op as quantization
from vit_efficient.quantization.fp8_layers import DeployedFp8
from vit_efficient.quantization.int8_deployed import DeployedInt8


class Codes(NamedTuple):
    """A quantized tensor: codes (..., K), and the scales of its rows, (..., 1) or one in all."""

    values: Tensor
    scale: Tensor


class FusedLinear:
    """A deployed int8 or fp8 linear layer, as a fused block calls it. Make one with `view`."""

    def __init__(self, layer: DeployedInt8 | DeployedFp8) -> None:
        self.layer = layer
        scheme = layer.scheme
        self.form: FormatName = "fp8"
        self.grouped = False
        if isinstance(layer, DeployedInt8):
            self.form = "int8" if layer.scheme.activation_bits == 8 else "int4"
            self.grouped = layer.scheme.group is not None
            layer.keep_unpacked()
        self.accumulation: linear.Accumulation = getattr(scheme, "accumulation", "full")
        self.activations: str = scheme.activations
        self.shifts = layer.shift is not None
        self.smooths = getattr(layer, "smooth", None) is not None

    @property
    def plain_input(self) -> bool:
        """Whether codes need a scale alone: nothing is subtracted from the input, and it is divided by nothing."""
        return self.activations != "tensor" and not self.shifts and not self.smooths

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None]:
        """`shift` and `smooth` (K,) of the input, each if there is one."""
        return self.layer.shift, getattr(self.layer, "smooth", None)

    @property
    def input_scale(self) -> Tensor | None:
        """The step of static activations; None where it is chosen in each forward."""
        return getattr(self.layer, "input_scale", None)

    def same_codes(self, other: FusedLinear) -> bool:
        """Whether both layers make the same codes of the same input."""
        if (self.form, self.activations) != (other.form, other.activations):
            return False
        pairs = [(getattr(self.layer, n, None), getattr(other.layer, n, None)) for n in ("shift", "smooth")]
        pairs.append((self.input_scale, other.input_scale))
        return all((a is None and b is None) or (a is not None and b is not None and a.equal(b)) for a, b in pairs)

    def codes(self, x: Tensor, reciprocal: Tensor | None = None) -> Codes:
        """Quantize an input (..., K): what the layer itself would do to it. `reciprocal` is ``1 / smooth``, if it is
        at hand."""
        if self.activations != "tensor":
            return Codes(*quantization.quantize(x, self.form, self.input_scale, *self.vectors, reciprocal))
        values, scale = self.layer.codes(x)
        return Codes(values.view(x.shape), scale if scale.numel() == 1 else scale.view(*x.shape[:-1], 1))

    def output(self, x: Codes, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        """The layer: (..., N) in `dtype`. `bias` takes the place of one that the layer lacks."""
        bias = self.layer.bias if bias is None else bias
        if self.grouped:
            return self._by_groups(x, bias, dtype)
        return linear.linear(*self._operands(x), bias, dtype=dtype, accumulation=self.accumulation)

    def output_heads(
        self,
        x: Codes,
        heads: int,
        parts: int,
        scales: Tensor | None,
        bias: Tensor | None,
        outputs: slice = slice(None),
    ) -> Codes:
        """The layer, laid out and quantized for integer attention: int8 codes (P, B, H, T, E) of x (B, T, K).

        Args:
            x: its input.
            heads: H.
            parts: P, 3 of a fused qkv.
            scales: one for each part (P,); None: each token's and head's own.
            bias: takes the place of one that the layer lacks.
            outputs: those of its outputs that are wanted.
        """
        operands = self._outputs(x, bias, outputs)
        options = {"parts": parts, "scales": scales, "accumulation": self.accumulation}
        return Codes(*linear.linear_heads_quant(*operands, heads, **options))  # type: ignore[arg-type]

    def output_float_heads(
        self, x: Codes, heads: int, dtype: torch.dtype, bias: Tensor | None, outputs: slice = slice(None)
    ) -> Tensor:
        """The layer, laid out for attention in `dtype`: one part (B, H, T, E); else as `output_heads`."""
        operands = self._outputs(x, bias, outputs)
        return linear.linear_heads(*operands, heads, dtype=dtype, parts=1, accumulation=self.accumulation).squeeze(0)

    def output_gelu(self, x: Codes, dtype: torch.dtype) -> Tensor:
        """The layer, then GELU (the erf form): (..., N) in `dtype`."""
        if self.grouped:
            return nn.functional.gelu(self._by_groups(x, self.layer.bias, torch.float32)).to(dtype)
        return linear.linear(
            *self._operands(x), self.layer.bias, dtype=dtype, gelu=True, accumulation=self.accumulation
        )

    def apart(self, following: FusedLinear) -> str | None:
        """Why the product cannot end in the codes of the layer that follows; None: it can."""
        if following.activations == "tensor":
            return "one scale for the whole tensor is known only when all of it is there"
        if following.input_scale is None:
            return "a token's own scale is known only when its whole row is there (hybrid and static have given ones)"
        return "the weight before it has groups, which are products of their own" if self.grouped else None

    def output_gelu_codes(
        self, x: Codes, following: FusedLinear, dtype: torch.dtype, reciprocal: Tensor | None = None
    ) -> Codes:
        """The layer, then GELU, then the codes of the layer that follows; `dtype` is rounded to on the way only where
        `apart` says why. `reciprocal` is one over the following layer's `smooth`, if it is at hand."""
        if self.apart(following) is not None:
            return following.codes(self.output_gelu(x, dtype), reciprocal)
        scale, (shift, smooth) = following.input_scale, following.vectors
        assert scale is not None
        made = linear.linear_quant(
            *self._operands(x), self.layer.bias, scale, shift_N=shift, smooth_N=smooth, reciprocal_N=reciprocal,
            form=following.form, gelu=True, accumulation=self.accumulation,
        )  # fmt: skip
        return Codes(*made)

    def add_output(self, x: Codes, residual: Tensor, gamma: Tensor | None) -> Tensor:
        """``residual + gamma * layer``: (..., N) in the residual's dtype. `gamma` (N,) is the layer scale, or None."""
        if self.grouped:
            y = self._by_groups(x, self.layer.bias, torch.float32)
            y = y if gamma is None else gamma.to(torch.float32) * y
            return (residual.to(torch.float32) + y).to(residual.dtype)
        operands = *self._operands(x), self.layer.bias
        return linear.linear_residual(*operands, residual, gamma, accumulation=self.accumulation)

    def _operands(self, x: Codes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        layer = self.layer
        weight = layer.weight_codes() if isinstance(layer, DeployedInt8) else layer.weight
        return x.values, x.scale, weight, layer.weight_scale

    def _outputs(
        self, x: Codes, bias: Tensor | None, outputs: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """`_operands` and the bias of some of the outputs: views."""
        values, scale, weight, weight_scale = self._operands(x)
        bias = self.layer.bias if bias is None else bias
        own = weight_scale if weight_scale.numel() == 1 else weight_scale[outputs]
        return values, scale, weight[outputs], own, None if bias is None else bias[outputs]

    def _by_groups(self, x: Codes, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Groups of inputs have weight scales of their own: the product is not one matrix product."""
        layer = self.layer
        assert isinstance(layer, DeployedInt8)
        if layer.packed_in_groups and x.values.device.type == "cuda":
            return layer.multiply_codes(*x, bias, dtype)
        rows_MK, scale_M1 = x.values.reshape(-1, x.values.shape[-1]), x.scale.reshape(-1, 1)
        weight = layer.weight_codes(), layer.weight_scale.to(torch.float32)
        y_MN = int8.multiply(rows_MK, scale_M1, *weight, bias, layer.scheme, dtype)
        return y_MN.view(*x.values.shape[:-1], -1)


def view(layer: nn.Module) -> FusedLinear | str:
    """A layer as a fused block calls it; or, in words, why it cannot be."""
    if isinstance(layer, DeployedInt8) and layer.deployed == "linear":
        if layer.scheme.activations == "none":
            return "has integer weights only: its inputs are not quantized"
        return FusedLinear(layer)
    if isinstance(layer, DeployedFp8) and layer.deployed == "linear":
        return FusedLinear(layer)
    if isinstance(layer, nn.Linear) and type(layer) is nn.Linear:
        return "is kept in floating point"
    if hasattr(layer, "to_deployed") and layer.to_deployed is not None and hasattr(layer, "scheme"):
        return "still has its float weight: finalize the quantization first"
    return f"is a {type(layer).__name__}, which multiplies no codes"
