"""Integer layers: the trainable ones, which keep a float weight and quantize it in each forward, and the deployed ones.

Both forwards are the same integer arithmetic (`kernels.int8_linear`), so what is trained is what is deployed, bit for
bit. Legend: B batch, C channels, H and W pixels, D outputs, P patch side, M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vit_efficient.kernels.int8_linear.op import int8_linear, int8_linear_codes, quantize_rows
from vit_efficient.quantization.select import Layer, is_patches
from vit_efficient.quantization.surgery import replace


class Int8Linear(nn.Linear):
    """`nn.Linear` whose forward, in training and in evaluation, runs on int8 codes. The same parameters by name."""

    def forward(self, x: Tensor) -> Tensor:
        return int8_linear(x, self.weight, self.bias)


class Int8Patches(nn.Conv2d):
    """A convolution with kernel = stride, as an integer linear layer on patches: each patch is a token."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens, grid = to_patches(x_BCHW, self.kernel_size)
        return to_image(int8_linear(tokens, self.weight.flatten(1), self.bias), grid)


class DeployedInt8(nn.Module):
    """An integer layer without its float weight.

    Buffers: `weight` int8 codes in the shape of the float weight, `weight_scale` (N,) float32, `bias` (N,) float32 or
    None.

    Args:
        shape: of the weight: (N, K), or (D, C, P, P) for patches.
        bias: whether there is one.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.deployed: Literal["linear", "patches"] = "patches" if len(shape) == 4 else "linear"
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(shape[0], dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=torch.float32) if bias else None)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight[0].numel()

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Int8Linear | Int8Patches) -> DeployedInt8:
        """The deployed form of a trained layer."""
        deployed = cls(tuple(layer.weight.shape), layer.bias is not None).to(layer.weight.device)
        codes, scale = quantize_rows(layer.weight.flatten(1))
        deployed.weight.copy_(codes.view_as(deployed.weight))
        deployed.weight_scale.copy_(scale.squeeze(1))
        if deployed.bias is not None:
            deployed.bias.copy_(layer.bias)  # type: ignore[arg-type]
        return deployed.train(layer.training)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Scales and bias stay float32, whatever dtype the model is cast to; they follow it to its device."""
        scale, bias = self.weight_scale, self.bias
        super()._apply(fn, recurse)
        device = self.weight_scale.device
        if device.type != "meta" and not scale.is_meta:  # a cast would have rounded them
            self.weight_scale = scale.to(device)
            self.bias = None if bias is None else bias.to(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.deployed == "linear":
            return int8_linear_codes(x, self.weight, self.weight_scale, self.bias)
        tokens, grid = to_patches(x, self.weight.shape[2:])
        return to_image(int8_linear_codes(tokens, self.weight.flatten(1), self.weight_scale, self.bias), grid)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, int8"


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


def trainable(layer: nn.Module) -> Int8Linear | Int8Patches:
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
    integer.weight, integer.bias = layer.weight, layer.bias
    return integer.train(layer.training)


def quantize(model: nn.Module, layers: list[Layer]) -> None:
    """Replace float layers by trainable integer ones, in place."""
    for layer in layers:
        replace(model, layer.name, trainable(layer.module))


def finalize(model: nn.Module) -> None:
    """Replace trainable integer layers by deployed ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Int8Linear, Int8Patches)):
            replace(model, name, DeployedInt8.of(module))
