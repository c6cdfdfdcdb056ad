"""What a file says of each quantized layer and adapter: enough to make the empty layer that its tensors go into."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, runtime_checkable

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter
from torch import Tensor

from vit_efficient.config import Config

if TYPE_CHECKING:
    from torch import nn

Dtype = Literal["float32", "bfloat16", "float16"]


class Stored(Config, ABC):
    """One quantized layer; `shape` is that of its float weight: (N, K), or (D, C, P, P) for patches."""

    shape: tuple[PositiveInt, ...]

    @abstractmethod
    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the layer's tensors (by their names inside the layer), before any is loaded; or None."""

    @abstractmethod
    def build(self, bias: bool) -> nn.Module:
        """An empty layer, in deployed form and on the CPU, to load the tensors into."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@runtime_checkable
class QuantizedLayer(Protocol):
    """What `deploy` asks of every quantized layer."""

    deployed: Literal["linear", "patches"]

    def to_deployed(self) -> nn.Module:
        """The layer as it ships; itself where it already is."""

    def describe(self) -> Stored:
        """How that form is stored."""


def expected(tensors: Mapping[str, Tensor], **wanted: tuple[object, int]) -> str | None:
    """Compare tensors with (dtype, number of elements) by name; the first that differs, in words."""
    for name, (dtype, size) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            return f"it lacks {name}"
        if tensor.dtype != dtype or tensor.numel() != size:
            return f"{name} is {tensor.numel():,} x {tensor.dtype}, not {size:,} x {dtype}"
    return None


class StoredInt8(Stored):
    """Integer codes and scales (`int8_layers.DeployedInt8`)."""

    kind: Literal["int8"] = "int8"
    weight_bits: Literal[8, 4] = 8
    activation_bits: Literal[8, 4] = 8
    weights: Literal["channel", "tensor"] = "channel"
    group: PositiveInt | None = None
    activations: Literal["token", "tensor", "static"] = "token"
    smooth: bool = False

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        import torch

        from vit_efficient.kernels.int8_linear.scheme import Scheme

        scheme = Scheme.of(self)
        rows, inputs = self.shape[0], self.size // self.shape[0]
        scales = 1 if self.weights == "tensor" else rows * scheme.groups(inputs)
        weight = (torch.int8, self.size) if self.weight_bits == 8 else (torch.uint8, rows * ((inputs + 1) // 2))
        return expected(tensors, weight=weight, weight_scale=(torch.float32, scales))

    def build(self, bias: bool) -> nn.Module:
        from vit_efficient.kernels.int8_linear.scheme import Scheme
        from vit_efficient.quantization.int8_layers import DeployedInt8

        return DeployedInt8(self.shape, bias, Scheme.of(self), smooth=self.smooth)


class StoredBnb4(Stored):
    """bitsandbytes' 4-bit code books (`int4_layers.FrozenLinear4bit`)."""

    kind: Literal["nf4", "fp4"]
    double_quant: bool = False
    compute_dtype: Dtype = "float32"

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        import torch

        return expected(tensors, weight=(torch.uint8, (self.size + 1) // 2))

    def build(self, bias: bool) -> nn.Module:
        import torch

        from vit_efficient.quantization.int4_layers import FrozenLinear4bit

        return FrozenLinear4bit.empty(
            self.shape, bias, type=self.kind, double_quant=self.double_quant,  # type: ignore[arg-type]
            compute_dtype=getattr(torch, self.compute_dtype),
        )  # fmt: skip


class StoredAdapter(Config):
    """A low-rank adapter: its output is scaled by alpha / rank, or by alpha / sqrt(rank) with rsLoRA."""

    rank: PositiveInt
    alpha: PositiveFloat
    dora: bool = False
    rslora: bool = False


StoredLayer = Annotated[StoredInt8 | StoredBnb4, Field(discriminator="kind")]
LAYERS: TypeAdapter[dict[str, StoredLayer]] = TypeAdapter(dict[str, StoredLayer])
ADAPTERS = TypeAdapter(dict[str, StoredAdapter])
