"""Fp8 layers: the trainable ones, which keep a float weight and quantize it in each forward, and the deployed ones.

Both forwards are the same arithmetic (`kernels.fp8_linear`), so what is trained is what is deployed. Legend: B batch,
C channels, H and W pixels, D outputs, P patch side, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vit_efficient.kernels.fp8_linear.op import fp8_linear, fp8_linear_codes
from vit_efficient.kernels.fp8_linear.reference import FORMAT, Scheme, quantize_weight
from vit_efficient.quantization.int8_layers import to_image, to_patches
from vit_efficient.quantization.select import Layer, is_patches
from vit_efficient.quantization.stored import StoredFp8
from vit_efficient.quantization.surgery import replace


class Fp8Linear(nn.Linear):
    """`nn.Linear` whose forward, in training and in evaluation, runs on e4m3 codes. The same parameters by name."""

    deployed: Literal["linear", "patches"] = "linear"
    scheme: Scheme

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.bias, self.scheme)

    def to_deployed(self) -> DeployedFp8:
        """The layer without its float weight."""
        return DeployedFp8.of(self)

    def describe(self) -> StoredFp8:
        """How the deployed form is stored."""
        return _describe(self)


class Fp8Patches(nn.Conv2d):
    """A convolution with kernel = stride, as an fp8 linear layer on patches: each patch is a token."""

    deployed: Literal["linear", "patches"] = "patches"
    scheme: Scheme

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens, grid = to_patches(x_BCHW, self.kernel_size)
        return to_image(fp8_linear(tokens, self.weight.flatten(1), self.bias, self.scheme), grid)

    def to_deployed(self) -> DeployedFp8:
        """The layer without its float weight."""
        return DeployedFp8.of(self)

    def describe(self) -> StoredFp8:
        """How the deployed form is stored."""
        return _describe(self)


class DeployedFp8(nn.Module):
    """An fp8 layer without its float weight.

    Buffers: `weight` float8_e4m3fn in the shape of the float weight, `weight_scale` (N,) or (1,) float32, `bias` (N,)
    float32 or None.

    Args:
        shape: of the weight: (N, K), or (D, C, P, P) for patches.
        bias: whether there is one.
        scheme: where scales are, and how products are summed.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], bias: bool, scheme: Scheme) -> None:
        super().__init__()
        self.deployed: Literal["linear", "patches"] = "patches" if len(shape) == 4 else "linear"
        self.scheme = scheme
        scales = shape[0] if scheme.weights == "channel" else 1
        self.register_buffer("weight", torch.zeros(shape, dtype=FORMAT))
        self.register_buffer("weight_scale", torch.ones(scales, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=torch.float32) if bias else None)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight[0].numel()

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Fp8Linear | Fp8Patches) -> DeployedFp8:
        """The deployed form of a trained layer."""
        made = cls(tuple(layer.weight.shape), layer.bias is not None, layer.scheme).to(layer.weight.device)
        codes, scale = quantize_weight(layer.weight.flatten(1), layer.scheme)
        made.weight.copy_(codes.view_as(made.weight))
        made.weight_scale.copy_(scale.squeeze(1))
        if made.bias is not None:
            made.bias.copy_(layer.bias)  # type: ignore[arg-type]
        return made.train(layer.training)

    def to_deployed(self) -> DeployedFp8:
        """Itself."""
        return self

    def describe(self) -> StoredFp8:
        """How it is stored."""
        return _describe(self)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Codes, scales and bias keep their dtypes, whatever the model is cast to; they follow it to its device."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        scale_N1 = self.weight_scale.unsqueeze(1)
        if self.deployed == "linear":
            return fp8_linear_codes(x, self.weight, scale_N1, self.bias, self.scheme)
        tokens, grid = to_patches(x, self.weight.shape[2:])
        return to_image(fp8_linear_codes(tokens, self.weight.flatten(1), scale_N1, self.bias, self.scheme), grid)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, fp8, {self.scheme}"


def _describe(layer: Fp8Linear | Fp8Patches | DeployedFp8) -> StoredFp8:
    scheme = layer.scheme
    return StoredFp8(
        shape=tuple(layer.weight.shape), weights=scheme.weights, activations=scheme.activations,
        accumulation=scheme.accumulation,
    )  # fmt: skip


def trainable(layer: nn.Module, scheme: Scheme) -> Fp8Linear | Fp8Patches:
    """The fp8 form of a float layer, sharing its parameters."""
    made: Fp8Linear | Fp8Patches
    # `meta`: the parameters made here are thrown away at once.
    if isinstance(layer, nn.Linear):
        made = Fp8Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif isinstance(layer, nn.Conv2d) and is_patches(layer):
        height, width = layer.kernel_size
        patch, bias = (height, width), layer.bias is not None
        made = Fp8Patches(layer.in_channels, layer.out_channels, patch, patch, bias=bias, device="meta")
    else:
        raise TypeError(f"no fp8 form of {type(layer).__name__}")
    made.weight, made.bias, made.scheme = layer.weight, layer.bias, scheme
    return made.train(layer.training)


def quantize(model: nn.Module, layers: list[Layer], scheme: Scheme) -> None:
    """Replace float layers by trainable fp8 ones, in place."""
    for layer in layers:
        replace(model, layer.name, trainable(layer.module, scheme))


def finalize(model: nn.Module) -> None:
    """Replace trainable fp8 layers by deployed ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Fp8Linear, Fp8Patches)):
            replace(model, name, module.to_deployed())
