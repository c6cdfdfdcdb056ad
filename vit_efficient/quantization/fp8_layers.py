"""Fp8 layers: the trainable ones, which keep a float weight and quantize it in each forward, and the deployed ones.

Both forwards are the same arithmetic (`kernels.fp8_linear`), so what is trained is what is deployed. Legend: B batch,
C channels, H and W pixels, D outputs, P patch side, K inputs, N outputs.

What calibration may add, float32 whatever the model is cast to:

- `shift` (K,): subtracted from the inputs, since a float is rounded by its size; the bias has what that takes away.
- `input_scale` (): the scale of static activations.
- `weight_scale` (N,) or (1,): given scales of the weight; without them its largest magnitude decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vit_efficient.kernels.fp8_linear.op import fp8_linear, fp8_linear_codes, output_dtype
from vit_efficient.kernels.fp8_linear.reference import FORMAT, Scheme, quantize_activations, quantize_weight
from vit_efficient.quantization.calibratable import Calibratable, Fit
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.int8_base import to_image, to_patches
from vit_efficient.quantization.select import Layer, is_patches
from vit_efficient.quantization.stored import StoredFp8
from vit_efficient.quantization.surgery import replace


class Fp8Layer(nn.Module):
    """What trainable and deployed fp8 layers share."""

    scheme: Scheme
    weight: Tensor
    bias: Any  # a parameter, a buffer, or None
    shift: Tensor | None
    input_scale: Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (N, K), or (D, C, P, P) for patches."""
        return tuple(self.weight.shape)

    @property
    def deployed(self) -> Literal["linear", "patches"]:
        return "patches" if len(self.shape) == 4 else "linear"

    def describe(self) -> StoredFp8:
        """How the deployed form is stored."""
        scheme = {key: getattr(self.scheme, key) for key in self.scheme.__dataclass_fields__}
        return StoredFp8(shape=self.shape, shift=self.shift is not None, **scheme)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the product: e4m3 codes (M, K) and their scales, (M, 1) or (1, 1), float32.

        Args:
            x: the layer's input: (..., K), or images (B, C, H, W) for patches.
        """
        tokens = self._shifted(to_patches(x, self.shape[2:])[0] if self.deployed == "patches" else x)
        return quantize_activations(tokens.reshape(-1, tokens.shape[-1]), self.scheme, self.input_scale)

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., K), less `shift`, to (..., N) in `dtype`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        dtype = output_dtype(x)  # before `shift` makes it float32
        if self.deployed == "linear":
            return self.multiply(self._shifted(x), dtype)
        tokens, grid = to_patches(x, self.shape[2:])
        return to_image(self.multiply(self._shifted(tokens), dtype), grid)

    def _shifted(self, x: Tensor) -> Tensor:
        return x if self.shift is None else x.to(torch.float32) - self.shift

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Buffers (codes, scales, shifts) keep their dtypes, whatever the model is cast to; they follow it to its
        device."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class TrainableFp8(Fp8Layer, Calibratable):
    """A float weight that each forward quantizes anew."""

    weight_scale: Tensor | None

    @property
    def static(self) -> bool:
        return self.scheme.activations == "static"

    def share(self, layer: Any, scheme: Scheme) -> None:
        """Take the parameters of a float layer."""
        self.scheme = scheme
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("shift", None)
        self.register_buffer("weight_scale", None)
        # NaN: not calibrated yet. It shows in every output.
        unknown = torch.tensor(torch.nan, dtype=torch.float32, device=layer.weight.device)
        self.register_buffer("input_scale", unknown if self.static else None)
        self.observing = False
        self.train(layer.training)

    def fit(self, name: str, x_TK: Tensor, weight_T: Tensor | None, config: CalibrationConfig) -> Fit:
        from vit_efficient.quantization.fit_fp8 import fit_fp8

        return fit_fp8(name, self, x_TK, weight_T, config)

    def given_scale(self) -> Tensor | None:
        """The weight's given scales as a column, (N, 1) or (1, 1)."""
        return None if self.weight_scale is None else self.weight_scale.unsqueeze(1)

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        weight_NK = self.weight.flatten(1)
        if self.observing:
            bias_N = None if self.bias is None else self.bias.to(dtype)
            return F.linear(tokens.to(dtype), weight_NK.to(dtype), bias_N)
        return fp8_linear(tokens, weight_NK, self.bias, self.scheme, self.given_scale(), dtype, self.input_scale)

    def to_deployed(self) -> DeployedFp8:
        """The layer without its float weight."""
        return DeployedFp8.of(self)

    def _load_from_state_dict(self, state_dict, prefix, *rest):  # type: ignore[no-untyped-def]
        """Take the form of what is loaded: a freshly quantized model loads a checkpoint of a calibrated one."""
        for name in ("bias", "shift", "weight_scale"):
            loaded = state_dict.get(f"{prefix}{name}")
            if loaded is not None and getattr(self, name) is None:
                empty = torch.empty_like(loaded, device=self.weight.device)
                setattr(self, name, nn.Parameter(empty) if name == "bias" else empty)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Fp8Linear(TrainableFp8, nn.Linear):
    """`nn.Linear` whose forward, in training and in evaluation, runs on e4m3 codes. The same parameters by name."""


class Fp8Patches(TrainableFp8, nn.Conv2d):
    """A convolution with kernel = stride, as an fp8 linear layer on patches: each patch is a token."""


class DeployedFp8(Fp8Layer):
    """An fp8 layer without its float weight.

    Buffers: `weight` float8_e4m3fn in the shape of the float weight, `weight_scale` (N,) or (1,) float32, `bias` (N,)
    float32 or None, `shift` (K,) float32 or None, `input_scale` () float32 of static activations or None.

    Args:
        shape: of the weight: (N, K), or (D, C, P, P) for patches.
        bias: whether there is one.
        scheme: where scales are, and how products are summed.
        shift: whether a vector is subtracted from inputs.
    """

    weight_scale: Tensor

    def __init__(self, shape: tuple[int, ...], bias: bool, scheme: Scheme, shift: bool = False) -> None:
        super().__init__()
        self.scheme = scheme
        scales = shape[0] if scheme.weights == "channel" else 1
        self.register_buffer("weight", torch.zeros(shape, dtype=FORMAT))
        self.register_buffer("weight_scale", torch.ones(scales, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=torch.float32) if bias else None)
        inputs = int(torch.Size(shape[1:]).numel())
        self.register_buffer("shift", torch.zeros(inputs, dtype=torch.float32) if shift else None)
        static = torch.ones((), dtype=torch.float32) if scheme.activations == "static" else None
        self.register_buffer("input_scale", static)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight[0].numel()

    @classmethod
    @torch.no_grad()
    def of(cls, layer: TrainableFp8) -> DeployedFp8:
        """The deployed form of a trained layer."""
        made = cls(layer.shape, layer.bias is not None, layer.scheme, layer.shift is not None).to(layer.weight.device)
        codes, scale = quantize_weight(layer.weight.flatten(1), layer.scheme, layer.given_scale())
        made.weight.copy_(codes.view_as(made.weight))
        made.weight_scale.copy_(scale.squeeze(1))
        if made.bias is not None:
            made.bias.copy_(layer.bias)
        if made.shift is not None and layer.shift is not None:
            made.shift.copy_(layer.shift)
        if made.input_scale is not None and layer.input_scale is not None:
            made.input_scale.copy_(layer.input_scale)
        return made.train(layer.training)

    def to_deployed(self) -> DeployedFp8:
        """Itself."""
        return self

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        scale_N1 = self.weight_scale.unsqueeze(1)
        weight_NK = self.weight.flatten(1)
        return fp8_linear_codes(tokens, weight_NK, scale_N1, self.bias, self.scheme, dtype, self.input_scale)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, fp8, {self.scheme}"


def trainable(layer: nn.Module, scheme: Scheme) -> TrainableFp8:
    """The fp8 form of a float layer, sharing its parameters."""
    made: TrainableFp8
    # `meta`: the parameters made here are thrown away at once.
    if isinstance(layer, nn.Linear):
        made = Fp8Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif isinstance(layer, nn.Conv2d) and is_patches(layer):
        height, width = layer.kernel_size
        patch, bias = (height, width), layer.bias is not None
        made = Fp8Patches(layer.in_channels, layer.out_channels, patch, patch, bias=bias, device="meta")
    else:
        raise TypeError(f"no fp8 form of {type(layer).__name__}")
    made.share(layer, scheme)
    return made


def quantize(model: nn.Module, layers: list[Layer], scheme: Callable[[Layer], Scheme]) -> None:
    """Replace float layers by trainable fp8 ones, in place; `scheme` says how each computes."""
    for layer in layers:
        replace(model, layer.name, trainable(layer.module, scheme(layer)))


def finalize(model: nn.Module) -> None:
    """Replace trainable fp8 layers by deployed ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, TrainableFp8):
            replace(model, name, module.to_deployed())
