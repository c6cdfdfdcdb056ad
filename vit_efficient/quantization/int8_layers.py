"""Integer layers: the trainable ones, which keep a float weight and quantize it in each forward, and the deployed ones.

Both forwards are the same integer arithmetic (`kernels.int8_linear`), so what is trained is what is deployed, bit for
bit. Legend: B batch, C channels, H and W pixels, D outputs, P patch side, M tokens, K inputs, N outputs, G groups.

What a layer may have beside weight and bias, all float32 whatever the model is cast to:

- `shift` (K,): subtracted from the inputs; the bias has what that takes away (Outlier Suppression+, arXiv:2304.09145).
- `smooth` (K,): inputs are divided by it, and the weight has been multiplied by it (SmoothQuant, arXiv:2211.10438).
- `input_scale` (): the step of static activations.
- `weight_scale` (N, G), or (1, 1): given steps of the weight; without them its largest magnitude decides.
- `weight_zero` (N, G): zero points beside given steps, of 4-bit weights that have them; bytes in deployed form.
- `log_input_scale`, `log_weight_scale`: the logarithms of these two where they are learned. A step is positive, and
  the optimizer's rate is then a relative change of it, the same for weights and activations of any size (Jain et al.,
  arXiv:1903.08066, section 3, argue so for thresholds). The factor 1 / sqrt(values x largest code) by which LSQ (Esser
  et al., arXiv:1902.08153, section 2.2) scales the gradient of a step is left out on purpose: Adam divides by the
  gradient's size, so the factor would change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.kernels.int8_linear.op import (
    dequantize_weight,
    int8_linear,
    int8_linear_codes,
    output_dtype,
    quantize_activations,
    quantize_weight,
)
from vit_efficient.kernels.int8_linear.packing import pack, unpack
from vit_efficient.kernels.int8_linear.reference import in_16_bits, weight_range
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization.calibratable import Calibratable, Fit
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.select import Layer, is_patches
from vit_efficient.quantization.stored import StoredInt8
from vit_efficient.quantization.surgery import replace

FLOAT32 = ("shift", "smooth", "input_scale", "weight_scale", "log_input_scale", "log_weight_scale")


class IntegerLayer(nn.Module):
    """What trainable and deployed integer layers share."""

    scheme: Scheme
    weight: Tensor
    bias: Any  # a parameter, a buffer, or None
    shift: Tensor | None
    smooth: Tensor | None
    input_scale: Tensor | None
    weight_scale: Tensor | None
    weight_zero: Tensor | None
    float32_too: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the float weight: (N, K), or (D, C, P, P) for patches."""
        return tuple(self.weight.shape)

    @property
    def deployed(self) -> Literal["linear", "patches"]:
        return "patches" if len(self.shape) == 4 else "linear"

    def describe(self) -> StoredInt8:
        """How the deployed form is stored."""
        scheme = {key: getattr(self.scheme, key) for key in self.scheme.__dataclass_fields__}
        return StoredInt8(shape=self.shape, smooth=self.smooth is not None, shift=self.shift is not None, **scheme)

    def smoothed(self, x: Tensor) -> Tensor:
        """The input (..., K) that is quantized: less `shift`, divided by `smooth`, each rounded to float32."""
        if self.shift is not None:
            x = x.to(torch.float32) - self.shift
        return x if self.smooth is None else x.to(torch.float32) / self.smooth

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the product: int8 codes (M, K) and their scales (M, 1) float32.

        Args:
            x: the layer's input: (..., K), or images (B, C, H, W) for patches.

        Raises:
            ValueError: its activations are not quantized.
        """
        tokens = to_patches(x, self.shape[2:])[0] if self.deployed == "patches" else x
        tokens = self.smoothed(tokens)
        return quantize_activations(tokens.reshape(-1, tokens.shape[-1]), self.scheme, self.current_input_scale())

    def current_input_scale(self) -> Tensor | None:
        """The step of static activations, learned or not."""
        return self.input_scale

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., K) to (..., N) in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        dtype = output_dtype(x)  # before `smooth` makes it float32
        if self.deployed == "linear":
            return self.multiply(self.smoothed(x), dtype)
        tokens, grid = to_patches(x, self.shape[2:])
        return to_image(self.multiply(self.smoothed(tokens), dtype), grid)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Scales stay float32, whatever dtype the model is cast to; they follow it to its device."""
        before = {name: getattr(self, name, None) for name in (*FLOAT32, *self.float32_too)}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name, None)
            if isinstance(tensor, Tensor) and not tensor.is_meta and isinstance(now, Tensor) and not now.is_meta:
                kept = tensor.detach().to(now.device)  # a cast would have rounded it
                if isinstance(now, nn.Parameter):
                    now.data = kept
                else:
                    setattr(self, name, kept)
        return self


class _Trainable(IntegerLayer, Calibratable):
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
            self.log_input_scale = nn.Parameter(self.input_scale.log())
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
        return self.input_scale if self.log_input_scale is None else self.log_input_scale.exp()

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


class Int8Linear(_Trainable, nn.Linear):
    """`nn.Linear` whose forward, in training and in evaluation, runs on integers. The same parameters by name."""


class Int8Patches(_Trainable, nn.Conv2d):
    """A convolution with kernel = stride, as an integer linear layer on patches: each patch is a token."""


class DeployedInt8(IntegerLayer):
    """An integer layer without its float weight.

    Buffers: `weight`, int8 codes in the shape of the float weight (or two 4-bit codes a byte, (N, ceil(K / 2)) uint8);
    `weight_scale`; `bias` (N,) float32 or None; `shift`, `smooth` and `input_scale` if it has them.

    Args:
        shape: of the float weight.
        bias: whether there is one.
        scheme: the arithmetic.
        smooth: whether inputs are divided by a vector.
        shift: whether a vector is subtracted from them.
    """

    weight_scale: Tensor
    float32_too = ("bias",)

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        scheme: Scheme | None = None,
        smooth: bool = False,
        shift: bool = False,
    ) -> None:
        super().__init__()
        self.scheme = scheme = Scheme() if scheme is None else scheme
        self._shape = tuple(shape)
        rows, inputs = shape[0], self.in_features
        packed = torch.zeros(rows, (inputs + 1) // 2, dtype=torch.uint8)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8) if scheme.weight_bits == 8 else packed)
        scales = (1, 1) if scheme.weights == "tensor" else (rows, scheme.groups(inputs))
        # Of groups in 16 bits, which is exact: see `in_16_bits`.
        dtype = torch.float32 if scheme.group is None else torch.bfloat16
        self.register_buffer("weight_scale", torch.ones(scales, dtype=dtype))
        zeros = torch.zeros(scales, dtype=torch.uint8) if scheme.zero_point else None
        self.register_buffer("weight_zero", zeros)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)
        self.register_buffer("shift", torch.zeros(inputs) if shift else None)
        self.register_buffer("smooth", torch.ones(inputs) if smooth else None)
        self.register_buffer("input_scale", torch.ones(()) if scheme.activations == "static" else None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def out_features(self) -> int:
        return self._shape[0]

    @property
    def in_features(self) -> int:
        return int(torch.Size(self._shape[1:]).numel())

    def to_deployed(self) -> DeployedInt8:
        return self

    def weight_codes(self) -> Tensor:
        """The weight's codes, (N, K) int8."""
        if self.scheme.weight_bits == 8:
            return self.weight.flatten(1)
        return unpack(self.weight, self.in_features, self.offsets())

    def offsets(self) -> Tensor | int:
        """What is added to a 4-bit code to store it: its zero point, (N, K) int8, or 8."""
        if self.weight_zero is None:
            return 8
        zero_NG, group = self.weight_zero.to(torch.int8), self.scheme.group or self.in_features
        return zero_NG.repeat_interleave(group, dim=1)[:, : self.in_features]

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        codes, scale = self.weight_codes(), self.weight_scale.to(torch.float32)
        if self.scheme.activations == "none":
            weight = dequantize_weight(codes, scale, self.scheme, dtype)
            return F.linear(tokens.to(dtype), weight, bias_as(self.bias, dtype))
        return int8_linear_codes(tokens, codes, scale, self.bias, self.scheme, self.input_scale, dtype)

    def extra_repr(self) -> str:
        bits = f"W{self.scheme.weight_bits}A{self.scheme.activation_bits}"
        return f"{self.shape}, bias={self.bias is not None}, {bits}, activations={self.scheme.activations}"


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


def bias_as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def to_patches(x_BCHW: Tensor, patch: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """Cut images into patches (B, rows * columns, C * P * P) and their grid; what is left over is cut off."""
    batch, channels, height, width = x_BCHW.shape
    rows, columns = height // patch[0], width // patch[1]
    x = x_BCHW[:, :, : rows * patch[0], : columns * patch[1]]
    x = x.reshape(batch, channels, rows, patch[0], columns, patch[1]).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, rows * columns, -1), (rows, columns)


def to_image(x_BMD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens back to (B, D, rows, columns), as the convolution would have returned them."""
    return x_BMD.transpose(1, 2).unflatten(2, grid)


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
