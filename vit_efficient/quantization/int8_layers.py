"""Trainable integer layers, which keep a float weight and quantize it in each forward; from float and to deployed ones.

Both forwards are the same integer arithmetic (`kernels.int8_linear`), so what is trained is what is deployed, bit for
bit. Legend: N outputs, K inputs, T tokens. `int8_base` says what a layer may hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear.op import dequantize_weight, int8_linear, quantize_weight
from vit_efficient.kernels.int8_linear.packing import pack
from vit_efficient.kernels.int8_linear.reference import in_16_bits, weight_range
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization.calibratable import Calibratable, Fit
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int8_base import IntegerLayer, bias_as
from vit_efficient.quantization.int8_base import to_image as to_image
from vit_efficient.quantization.int8_base import to_patches as to_patches
from vit_efficient.quantization.int8_deployed import DeployedInt8
from vit_efficient.quantization.select import Layer, is_patches
from vit_efficient.quantization.surgery import replace


class TrainableInt8(IntegerLayer, Calibratable):
    """A float weight that each forward quantizes anew."""

    learned_ranges = ("log_input_scale", "log_weight_scale")  # for the optimizer: no weight decay, and they may freeze
    log_input_scale: nn.Parameter | None
    log_weight_scale: nn.Parameter | None

    def share(self, layer: Any, scheme: Scheme) -> None:
        """Take the parameters of a float layer."""
        self.scheme = scheme
        self.weight, self.bias = layer.weight, layer.bias
        device = layer.weight.device
        # NaN: not calibrated yet. It shows in every output.
        static = torch.tensor(torch.nan, device=device) if scheme.activations == "static" else None
        self.register_buffer("input_scale", static)
        for name in ("shift", "smooth", "weight_scale", "weight_zero"):
            self.register_buffer(name, None)
        self.observing = False
        self.register_parameter("log_input_scale", None)
        self.register_parameter("log_weight_scale", None)
        self.train(layer.training)

    @property
    def static(self) -> bool:
        return self.scheme.activations == "static"

    def fit(self, name: str, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig) -> Fit:
        from vit_efficient.quantization.fit_layer import fit_layer

        return fit_layer(name, self, x_TK, weight_T, config)

    @torch.no_grad()
    def learn_scales(self) -> None:
        """Make the steps of the weight, and of static activations, parameters, from where they are now."""
        scale, self.weight_zero = self.steps()
        self.weight_scale = None
        self.log_weight_scale = nn.Parameter(scale.log())
        if self.input_scale is not None:
            self.log_input_scale = nn.Parameter(self.input_scale.log().reshape(1))  # FSDP2 shards no scalars
            self.input_scale = None

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        """Take the form of what is loaded: what calibration added to the layer, and whether its steps are learned.

        So a freshly quantized model loads a checkpoint of a calibrated one, and needs no images for it.
        """
        for given in ("input_scale", "weight_scale"):
            if f"{prefix}log_{given}" in state_dict:
                setattr(self, given, None)
            elif f"{prefix}{given}" in state_dict:
                setattr(self, f"log_{given}", None)
        dynamic = () if self.scheme.activations == "static" else ("input_scale", "log_input_scale")
        for name, own in (*self._buffers.items(), *self._parameters.items()):
            loaded = state_dict.get(f"{prefix}{name}")
            if own is None and loaded is not None and name not in dynamic:
                empty = torch.empty_like(loaded, device=self.weight.device)
                setattr(self, name, nn.Parameter(empty) if name in self._parameters else empty)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def current_input_scale(self) -> Tensor | None:
        return self.input_scale if self.log_input_scale is None else self.log_input_scale.exp().squeeze()

    def current_weight_scale(self) -> Tensor | None:
        """The weight's given or learned steps."""
        if self.log_weight_scale is None:
            return self.weight_scale
        scale = self.log_weight_scale.exp()
        if self.scheme.group is None:
            return scale
        return scale + (in_16_bits(scale) - scale).detach()  # as it is stored; gradients pass

    def steps(self) -> tuple[Tensor, Tensor | None]:
        """The weight's steps, and its zero points if it has them, given or not."""
        weight_NK, scale = self.weight.flatten(1), self.current_weight_scale()
        if scale is not None:
            return scale, self.weight_zero
        if self.scheme.zero_point:
            return weight_range(weight_NK, self.scheme)
        return quantize_weight(weight_NK, self.scheme)[1], None

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        if self.observing:
            return F.linear(tokens.to(dtype), self.weight.flatten(1).to(dtype), bias_as(self.bias, dtype))
        if self.scheme.activations == "none":
            given = self.current_weight_scale(), self.weight_zero
            rounded = WeightOnly.apply(self.weight.flatten(1), *given, self.scheme)
            return F.linear(tokens.to(dtype), rounded.to(dtype), bias_as(self.bias, dtype))
        scales = self.current_input_scale(), self.current_weight_scale(), self.weight_zero
        return int8_linear(tokens, self.weight.flatten(1), self.bias, self.scheme, *scales, dtype)

    @torch.no_grad()
    def to_deployed(self) -> DeployedInt8:
        """The layer without its float weight."""
        made = DeployedInt8(
            self.shape, self.bias is not None, self.scheme, smooth=self.smooth is not None, shift=self.shift is not None
        )
        made = made.to(self.weight.device)
        steps, zero = self.steps()
        codes, scale = quantize_weight(self.weight.flatten(1), self.scheme, steps, zero)
        if zero is not None and made.weight_zero is not None:
            made.weight_zero.copy_(zero)
        made.weight.copy_(codes.view(self.shape) if self.scheme.weight_bits == 8 else pack(codes, made.offsets()))
        made.weight_scale.copy_(scale)
        given = {
            "bias": self.bias,
            "shift": self.shift,
            "smooth": self.smooth,
            "input_scale": self.current_input_scale(),
        }
        for name, value in given.items():
            if value is not None:
                getattr(made, name).copy_(value)
        return made.train(self.training)


class Int8Linear(TrainableInt8, nn.Linear):
    """`nn.Linear` whose forward, in training and in evaluation, runs on integers. The same parameters by name."""


class Int8Patches(TrainableInt8, nn.Conv2d):
    """A convolution with kernel = stride, as an integer linear layer on patches: each patch is a token."""


class WeightOnly(torch.autograd.Function):
    """The weight as its codes stand for it; gradients pass as if it had not been rounded."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, weight_NK: Tensor, scale_NG: Tensor | None, zero_NG: Tensor | None, scheme: Scheme
    ) -> Tensor:
        codes_NK, scale_NG = quantize_weight(weight_NK, scheme, scale_NG, zero_NG)
        return dequantize_weight(codes_NK, scale_NG, scheme, torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, None, None, None


def trainable(layer: nn.Module, scheme: Scheme | None = None) -> Int8Linear | Int8Patches:
    """The integer form of a float layer, sharing its parameters."""
    integer: Int8Linear | Int8Patches
    # `meta`: the parameters made here are thrown away at once.
    if isinstance(layer, nn.Linear):
        integer = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif isinstance(layer, nn.Conv2d) and is_patches(layer):
        height, width = layer.kernel_size
        patch, bias = (height, width), layer.bias is not None
        integer = Int8Patches(layer.in_channels, layer.out_channels, patch, patch, bias=bias, device="meta")
    else:
        raise TypeError(f"no integer form of {type(layer).__name__}")
    integer.share(layer, Scheme() if scheme is None else scheme)
    return integer


def quantize(model: nn.Module, layers: list[Layer], scheme: Callable[[Layer], Scheme] | None = None) -> None:
    """Replace float layers by trainable integer ones, in place; `scheme` says how each computes."""
    for layer in layers:
        replace(model, layer.name, trainable(layer.module, None if scheme is None else scheme(layer)))


def learn_scales(model: nn.Module) -> None:
    """Make the steps of all integer layers parameters, in place. A static one that is not calibrated yet is NaN."""
    for module in model.modules():
        if isinstance(module, (Int8Linear, Int8Patches)):
            module.learn_scales()


def finalize(model: nn.Module) -> None:
    """Replace trainable integer layers by deployed ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Int8Linear, Int8Patches)):
            replace(model, name, module.to_deployed())
