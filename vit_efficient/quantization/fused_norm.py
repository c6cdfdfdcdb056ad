"""A norm that ends in the codes of the layers behind it.

Shapes: D columns, `...` leading dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vit_efficient.kernels.layernorm_quant.op import layernorm_quant
from vit_efficient.quantization.fused_linear import Codes, FusedLinear


class NormCodes(nn.Module):
    """A norm, then the codes of one layer: one pass over the row on a GPU.

    What calibration made of the layer's input, ``(y - shift) / smooth``, is then part of the norm's own weight and
    bias: ``y = n * weight + bias`` becomes ``n * (weight / smooth) + (bias - shift) / smooth``, equal but for rounding.
    On a CPU each step runs by itself, as without fusion. Behind an identity there is nothing to fold into: the kernel
    that makes the codes takes shift and smoothing, and `reciprocal`, which is ``1 / smooth``, made once.

    Args:
        norm: of the last dimension, or an identity. It stays where it is in the model; this only looks at it.
        layer: the layer whose codes are made.
    """

    weight: Tensor | None
    bias: Tensor | None
    reciprocal: Tensor | None

    def __init__(self, norm: nn.Module, layer: FusedLinear) -> None:
        super().__init__()
        self.held = (norm, layer)  # in a tuple: neither a child nor saved here
        self.one_pass = isinstance(norm, nn.LayerNorm) and layer.activations != "tensor"
        self.folds = self.one_pass and (layer.shifts or layer.smooths)
        self.register_buffer("weight", None, persistent=False)
        self.register_buffer("bias", None, persistent=False)
        self.register_buffer("reciprocal", None, persistent=False)
        self.fold()

    @property
    def identity(self) -> bool:
        """Whether there is no norm."""
        return isinstance(self.held[0], nn.Identity)

    @property
    def apart(self) -> str | None:
        """Why the norm cannot end in codes; None: it does, or it is an identity."""
        norm, layer = self.held
        if self.one_pass or self.identity:
            return None
        if layer.activations == "tensor":
            return "one scale for the whole tensor is known only when all of it is there"
        return f"{type(norm).__name__} is not a LayerNorm"

    @torch.no_grad()
    def fold(self) -> None:
        """Take shift and smoothing into the norm, from what both are now."""
        norm, layer = self.held
        shift, smooth = layer.vectors
        if not self.folds:
            self.reciprocal = None if smooth is None else smooth.reciprocal()
            return
        assert isinstance(norm, nn.LayerNorm)
        one = torch.ones(norm.normalized_shape, device=(shift if smooth is None else smooth).device)  # type: ignore[union-attr]
        smooth = one if smooth is None else smooth
        weight = one if norm.weight is None else norm.weight.to(torch.float32)
        bias = torch.zeros_like(one) if norm.bias is None else norm.bias.to(torch.float32)
        self.weight, self.bias = weight / smooth, (bias if shift is None else bias - shift) / smooth

    def forward(self, x: Tensor) -> Codes:
        """(..., D) to its codes."""
        norm, layer = self.held
        if not (self.one_pass and x.is_cuda):
            return layer.codes(norm(x), self.reciprocal)
        assert isinstance(norm, nn.LayerNorm)
        affine = (self.weight, self.bias) if self.folds else (norm.weight, norm.bias)
        return Codes(*layernorm_quant(x, *affine, norm.eps, layer.form, layer.input_scale))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move; the folded vectors stay float32, whatever dtype the model is cast to."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class SharedNormCodes(nn.Module):
    """A norm, then the codes of several layers, made once for all that want the same.

    Args:
        norm: as in `NormCodes`.
        layers: what reads the norm's output.
    """

    def __init__(self, norm: nn.Module, layers: Sequence[FusedLinear]) -> None:
        super().__init__()
        first: list[FusedLinear] = []
        self.which: list[int] = []
        for layer in layers:
            same = next((i for i, other in enumerate(first) if other.same_codes(layer)), len(first))
            self.which.append(same)
            if same == len(first):
                first.append(layer)
        self.made = nn.ModuleList(NormCodes(norm, layer) for layer in first)

    def apart(self) -> list[str | None]:
        """`NormCodes.apart` for each layer."""
        reasons = [norm.apart for norm in self.made if isinstance(norm, NormCodes)]
        return [reasons[index] for index in self.which]

    def forward(self, x: Tensor) -> list[Codes]:
        """(..., D) to the codes for each layer, in their order."""
        made = [norm(x) for norm in self.made]
        return [made[index] for index in self.which]
