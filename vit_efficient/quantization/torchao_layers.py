"""Linear layers whose weight is one of torchao's tensors, saved and loaded as the plain tensors that it is made of.

torchao's own safetensors support is a prototype for whole state dicts, and makes objects of the class names that it
finds in a file. Here a file holds plain tensors, by PyTorch's protocol for tensors made of tensors
(``__tensor_flatten__``), and the name of a scheme: the empty layer that they go into is made by the scheme itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.errors import CapabilityError, UserError
from vit_efficient.kernels.int8_linear.op import cpu_int_mm_is_exact
from vit_efficient.quantization.select import Layer
from vit_efficient.quantization.stored import StoredTorchao
from vit_efficient.quantization.surgery import replace

try:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerTensor,
        quantize_,
    )
    from torchao.quantization.quantize_.common import KernelPreference
except ModuleNotFoundError as error:
    if error.name != "torchao":
        raise
    raise CapabilityError("quantization=torchao: the package torchao is not installed. pip install torchao.") from error


class TorchaoLinear(nn.Module):
    """A frozen linear layer, (..., K) to (..., N), on a weight that torchao quantized.

    Its state dict holds `weight.NAME` for each plain tensor of the weight, and `bias`. Make one with `of` (from a float
    layer) or `empty` (to load a state dict into).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    deployed: Literal["linear", "patches"] = "linear"

    def __init__(self, weight: Tensor, bias: Tensor | None, described: StoredTorchao) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.described = described

    @classmethod
    def of(cls, layer: nn.Linear, described: StoredTorchao) -> TorchaoLinear:
        """Quantize a float layer where it is, from float32.

        Raises:
            UserError: torchao cannot quantize a weight of this shape so, or not on this machine.
        """
        outputs, inputs = layer.weight.shape
        if described.scheme == "float8_dynamic_activation_float8_weight":
            _require_fp8_units()
        if described.group is not None and inputs % described.group:
            raise UserError(
                f"quantization.group={described.group} does not divide the {inputs} inputs of a layer. "
                "Take a group that does, or put the layer into quantization.keep."
            )
        bare = nn.Linear(inputs, outputs, bias=False, device="meta")
        bare.weight = nn.Parameter(layer.weight.detach().to(torch.float32), requires_grad=False)
        quantize_(bare, torchao_config(described))
        if type(bare.weight.data) is Tensor:  # torchao leaves out what it cannot do, and does not say so
            raise UserError(
                f"quantization.scheme={described.scheme}: torchao has no such form of a weight of {outputs} x {inputs}."
                " Put the layer into quantization.keep, or use another scheme."
            )
        bias = None if layer.bias is None else layer.bias.to(torch.float32)
        return cls(bare.weight.data, bias, described).train(layer.training)

    @classmethod
    def empty(cls, described: StoredTorchao, bias: bool) -> TorchaoLinear:
        """A layer of zeros, to load a state dict into."""
        outputs, inputs = described.shape
        source = nn.utils.skip_init(nn.Linear, inputs, outputs, bias)
        for parameter in source.parameters():
            nn.init.zeros_(parameter)
        return cls.of(source, described)

    @property
    def in_features(self) -> int:
        return self.described.shape[1]

    @property
    def out_features(self) -> int:
        return self.described.shape[0]

    def plain(self) -> dict[str, Tensor]:
        """The tensors that the state dict holds, by name; they share the layer's memory."""
        names, _ = self.weight.data.__tensor_flatten__()  # type: ignore[attr-defined]
        tensors = {f"weight.{name}": getattr(self.weight, name) for name in names}
        return tensors if self.bias is None else tensors | {"bias": self.bias.data}

    def forward(self, x: Tensor) -> Tensor:
        if self.described.scheme == "int8_dynamic_activation_int8_weight" and x.device.type == "cpu":
            _require_exact_sums()
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if not x.numel():  # torchao fails on no tokens
            return x.new_zeros(*x.shape[:-1], self.out_features)
        # The weight is of float32, and some schemes multiply by its floats: autocast brings the two together.
        half = x.dtype if x.dtype != torch.float32 else None
        with torch.autocast(kind, half, enabled=half is not None):
            # torchao's fp8 product takes a bias of its output's dtype only.
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight, bias).to(x.dtype)

    def to_deployed(self) -> TorchaoLinear:
        """Itself: the weight is quantized from the start."""
        return self

    def describe(self) -> StoredTorchao:
        """How it is stored."""
        return self.described

    def extra_repr(self) -> str:
        return f"{self.described.shape}, bias={self.bias is not None}, {self.described.scheme}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchaoLinear:
        """Nothing changes its dtype, whatever the model is cast to; all follows it to its device."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        weight: Any = self.weight.data
        names, attributes = weight.__tensor_flatten__()
        parts = {name: moved(getattr(weight, name)) for name in names}
        made = type(weight).__tensor_unflatten__(parts, attributes, weight.size(), weight.stride())
        self.weight = nn.Parameter(made, requires_grad=False)
        if self.bias is not None:
            self.bias = nn.Parameter(moved(self.bias.data), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]
        destination |= {prefix + name: tensor for name, tensor in self.plain().items()}

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:  # type: ignore[no-untyped-def]
        own = {prefix + name: tensor for name, tensor in self.plain().items()}
        missing.extend(own.keys() - state_dict.keys())
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in own)
        for key, tensor in own.items():
            given = state_dict.get(key, tensor)
            if (given.dtype, given.shape) != (tensor.dtype, tensor.shape):
                errors.append(
                    f"{key} is {given.dtype} {tuple(given.shape)}, not the {tensor.dtype} {tuple(tensor.shape)} of "
                    f"{self.described.scheme}."
                )
            else:
                tensor.copy_(given)


def torchao_config(described: StoredTorchao) -> Any:
    """torchao's configuration of a scheme; none of them changes the settings of PyTorch's compiler."""
    group = PerAxis(0) if described.group is None else PerGroup(described.group)
    bits = getattr(torch, f"int{described.bits or 8}")
    made: dict[str, Callable[[], Any]] = {
        "int8_weight_only": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
        "int8_dynamic_activation_int8_weight": lambda: Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
        "intx_weight_only": lambda: IntxWeightOnlyConfig(weight_dtype=bits, granularity=group),
        "int8_dynamic_activation_intx_weight": lambda: Int8DynamicActivationIntxWeightConfig(
            weight_dtype=bits, weight_granularity=group
        ),
        "float8_weight_only": lambda: Float8WeightOnlyConfig(set_inductor_config=False),
        "float8_dynamic_activation_float8_weight": lambda: Float8DynamicActivationFloat8WeightConfig(
            granularity=PerTensor(), kernel_preference=KernelPreference.TORCH, set_inductor_config=False
        ),
    }
    return made[described.scheme]()


def _require_exact_sums() -> None:
    if not cpu_int_mm_is_exact():
        raise CapabilityError(
            "quantization.scheme=int8_dynamic_activation_int8_weight: this processor lacks VNNI, without which "
            "PyTorch's int8 product overflows. Use quantization=int8, which works around it, or a GPU."
        )


def _require_fp8_units() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise CapabilityError(
            "quantization.scheme=float8_dynamic_activation_float8_weight: torchao makes and runs it only where there "
            "is a GPU from sm_89 (Ada, Hopper). Use quantization=fp8, which a CPU computes too."
        )


def quantize(model: nn.Module, layers: list[Layer], scheme: Any, bits: Any, group: int | None) -> None:
    """Replace float linear layers by torchao's, in place.

    Raises:
        UserError: a layer is a convolution, or torchao cannot quantize it so.
    """
    for layer in layers:
        if not isinstance(layer.module, nn.Linear):
            raise UserError(
                f"quantization=torchao: {layer.name} is a convolution, and only linear layers are quantized. "
                "Put its name or its role, patch_embed, into quantization.keep."
            )
    made = {layer.name: _made(layer, scheme, bits, group) for layer in layers}  # all, before any is replaced
    for name, module in made.items():
        replace(model, name, module)


def _made(layer: Layer, scheme: Any, bits: Any, group: int | None) -> TorchaoLinear:
    assert isinstance(layer.module, nn.Linear)
    options = {"bits": bits, "group": group} if "intx" in scheme else {}
    described = StoredTorchao(shape=tuple(layer.module.weight.shape), scheme=scheme, **options)
    try:
        return TorchaoLinear.of(layer.module, described)
    except UserError as error:
        raise type(error)(f"{layer.name}: {error}") from error
