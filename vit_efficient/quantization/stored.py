"""What a file says of each quantized layer and adapter: enough to make the empty layer that its tensors go into."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, runtime_checkable

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter
from torch import Tensor

from vit_efficient.config import Config
from vit_efficient.quantization.torchao import TorchaoBits, TorchaoScheme

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


def unusable(tensors: Mapping[str, Tensor], *names: str) -> str | None:
    """Which of the scales there are is zero, negative or no number, in words."""
    for name in names:
        scale = tensors.get(name)
        if scale is not None and not bool((scale.isfinite() & (scale > 0)).all()):
            why = "the weight holds a NaN or an infinity" if name == "weight_scale" else "the layer was not calibrated"
            return f"{name} is zero, negative or not a number somewhere; probably {why}"
    return None


class StoredInt8(Stored):
    """Integer codes and scales (`int8_layers.DeployedInt8`)."""

    kind: Literal["int8"] = "int8"
    weight_bits: Literal[8, 4] = 8
    activation_bits: Literal[8, 4] = 8
    weights: Literal["channel", "tensor"] = "channel"
    group: PositiveInt | None = None
    activations: Literal["token", "tensor", "static", "none"] = "token"
    smooth: bool = False
    shift: bool = False
    zero_point: bool = False

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        import torch

        from vit_efficient.kernels.int8_linear.scheme import Scheme

        scheme = Scheme.of(self)
        rows, inputs = self.shape[0], self.size // self.shape[0]
        scales = 1 if self.weights == "tensor" else rows * scheme.groups(inputs)
        weight = (torch.int8, self.size) if self.weight_bits == 8 else (torch.uint8, rows * ((inputs + 1) // 2))
        zeros = {"weight_zero": (torch.uint8, scales)} if self.zero_point else {}
        of_scales = torch.float32 if self.group is None else torch.bfloat16
        if problem := expected(tensors, weight=weight, weight_scale=(of_scales, scales), **zeros):
            return problem
        return unusable(tensors, "weight_scale", "input_scale", "smooth")

    def build(self, bias: bool) -> nn.Module:
        from vit_efficient.kernels.int8_linear.scheme import Scheme
        from vit_efficient.quantization.int8_layers import DeployedInt8

        return DeployedInt8(self.shape, bias, Scheme.of(self), smooth=self.smooth, shift=self.shift)


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


class StoredBnb8(Stored):
    """bitsandbytes' int8 (`bnb_int8_layers.FrozenLinear8bit`)."""

    kind: Literal["bnb_int8"] = "bnb_int8"
    threshold: float = Field(6.0, ge=0)

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        import torch

        return expected(tensors, weight=(torch.int8, self.size), SCB=(torch.float32, self.shape[0]))

    def build(self, bias: bool) -> nn.Module:
        from vit_efficient.quantization.bnb_int8_layers import FrozenLinear8bit

        return FrozenLinear8bit.empty(self.shape, bias, threshold=self.threshold)  # type: ignore[arg-type]


class StoredFp8(Stored):
    """e4m3 codes and scales (`fp8_layers.DeployedFp8`)."""

    kind: Literal["fp8"] = "fp8"
    weights: Literal["channel", "tensor"] = "channel"
    activations: Literal["token", "tensor", "static"] = "token"
    accumulation: Literal["full", "fast"] = "full"
    shift: bool = False

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        import torch

        scales = self.shape[0] if self.weights == "channel" else 1
        shift = {"shift": (torch.float32, self.size // self.shape[0])} if self.shift else {}
        static = {"input_scale": (torch.float32, 1)} if self.activations == "static" else {}
        weight = (torch.float8_e4m3fn, self.size)
        if problem := expected(tensors, weight=weight, weight_scale=(torch.float32, scales), **shift, **static):
            return problem
        return unusable(tensors, "weight_scale", "input_scale")

    def build(self, bias: bool) -> nn.Module:
        from vit_efficient.kernels.fp8_linear.reference import Scheme
        from vit_efficient.quantization.fp8_layers import DeployedFp8

        return DeployedFp8(self.shape, bias, Scheme.of(self), self.shift)


class StoredTorchao(Stored):
    """The plain tensors that one of torchao's is made of (`torchao_layers.TorchaoLinear`).

    `bits` and `group` belong to the intx schemes, where no group means the whole row.
    """

    kind: Literal["torchao"] = "torchao"
    scheme: TorchaoScheme
    bits: TorchaoBits | None = None
    group: PositiveInt | None = None

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        codes = tensors.get("weight.qdata")
        if codes is None or codes.numel() != self.size or len(self.shape) != 2:
            return f"weight.qdata is not there, or not of {self.size:,} elements"
        wanted = self.build(False).state_dict()
        return expected(tensors, **{name: (tensor.dtype, tensor.numel()) for name, tensor in wanted.items()})

    def build(self, bias: bool) -> nn.Module:
        from vit_efficient.quantization.torchao_layers import TorchaoLinear

        return TorchaoLinear.empty(self, bias)


class StoredAttention(Config):
    """Integer attention (`int8_attention.Int8Attend`), by the name of the attention module."""

    mode: Literal["dynamic", "static"]
    granularity: Literal["token", "tensor"] = "token"
    values: Literal["int8", "float", "fp8"] = "int8"
    keys: Literal["token", "block"] = "token"

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with its tensors (`q_scale`, `k_scale` and, of int8 values, `v_scale`, of the static form
        only), or with itself; or None."""
        import torch

        if self.keys == "block" and (self.mode, self.granularity) != ("dynamic", "token"):
            return f"one scale a block of keys does not go with {self.mode} scales a {self.granularity}"
        if self.mode == "dynamic":
            return None
        names = ("q_scale", "k_scale", *(["v_scale"] if self.values == "int8" else []))
        if problem := expected(tensors, **dict.fromkeys(names, (torch.float32, 1))):
            return problem
        bad = [name for name in names if not (tensors[name].isfinite() & (tensors[name] > 0)).all()]
        return f"{bad[0]} is {tensors[bad[0]].item():g}, not a number above 0" if bad else None


class StoredFp8Attention(Config):
    """fp8 attention (`fp8_attention.Fp8Attend`), likewise. It has no tensors."""

    mode: Literal["fp8"]
    values: Literal["float", "fp8"] = "float"

    def check(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with its tensors: that there are any; or None."""
        return f"it has no tensors, and here is {next(iter(tensors))}" if tensors else None


class StoredAdapter(Config):
    """A low-rank adapter: its output is scaled by alpha / rank, or by alpha / sqrt(rank) with rsLoRA."""

    rank: PositiveInt
    alpha: PositiveFloat
    dora: bool = False
    rslora: bool = False


StoredLayer = Annotated[StoredInt8 | StoredBnb4 | StoredBnb8 | StoredFp8 | StoredTorchao, Field(discriminator="kind")]
LAYERS: TypeAdapter[dict[str, StoredLayer]] = TypeAdapter(dict[str, StoredLayer])
ADAPTERS = TypeAdapter(dict[str, StoredAdapter])
ATTENTION = TypeAdapter(dict[str, Annotated[StoredAttention | StoredFp8Attention, Field(discriminator="mode")]])
