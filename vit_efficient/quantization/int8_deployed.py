"""The integer layer as it ships: codes and scales, and no float weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vit_efficient.kernels.int4_linear.op import int4_linear, int4_linear_codes
from vit_efficient.kernels.int8_linear.op import dequantize_weight, int8_linear_codes, quantize_activations
from vit_efficient.kernels.int8_linear.packing import unpack
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization.int8_base import IntegerLayer, bias_as

IN_REGISTERS = (32, 64, 128)  # groups whose 4-bit codes the kernel unpacks in registers


class DeployedInt8(IntegerLayer):
    """An integer layer without its float weight.

    Buffers: `weight`, int8 codes in the shape of the float weight (or two 4-bit codes a byte, (N, ceil(K / 2)) uint8);
    `weight_scale`; `bias` (N,) float32 or None; `shift`, `smooth` and `input_scale` if it has them. `unpacked` (not
    saved) is None, or what `keep_unpacked` makes.

    Args:
        shape: of the float weight.
        bias: whether there is one.
        scheme: the arithmetic.
        smooth: whether inputs are divided by a vector.
        shift: whether a vector is subtracted from them.
    """

    weight_scale: Tensor
    unpacked: Tensor | None
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
        self.register_buffer("unpacked", None, persistent=False)
        self.register_load_state_dict_post_hook(_unpack_again)
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
        if self.unpacked is not None:
            return self.unpacked
        return unpack(self.weight, self.in_features, self.offsets())

    def keep_unpacked(self) -> None:
        """Hold 4-bit codes as bytes from now on, beside the packed ones: N x K bytes, the memory of 8-bit weights.

        For who multiplies by them often. Nothing happens where a kernel unpacks in registers, or to 8-bit codes.
        """
        if self.scheme.weight_bits == 4 and not self.packed_in_groups:
            self.unpacked = unpack(self.weight, self.in_features, self.offsets())

    @property
    def packed_in_groups(self) -> bool:
        """Whether a kernel unpacks the weight in registers, where there is a GPU."""
        return self.scheme.weight_bits == 4 and self.scheme.group in IN_REGISTERS

    def offsets(self) -> Tensor | int:
        """What is added to a 4-bit code to store it: its zero point, (N, K) int8, or 8."""
        if self.weight_zero is None:
            return 8
        zero_NG, group = self.weight_zero.to(torch.int8), self.scheme.group or self.in_features
        return zero_NG.repeat_interleave(group, dim=1)[:, : self.in_features]

    def multiply(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        if self.packed_in_groups and tokens.device.type == "cuda":  # unpacked in registers, never in memory
            return self._multiply_packed(tokens, dtype)
        codes, scale = self.weight_codes(), self.weight_scale.to(torch.float32)
        if self.scheme.activations == "none":
            weight = dequantize_weight(codes, scale, self.scheme, dtype)
            return F.linear(tokens.to(dtype), weight, bias_as(self.bias, dtype))
        return int8_linear_codes(tokens, codes, scale, self.bias, self.scheme, self.input_scale, dtype)

    def multiply_codes(self, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The product of a weight that is `packed_in_groups` with int8 codes (..., K): (..., N) in `dtype`."""
        assert self.scheme.group is not None
        weight = self.weight, self.weight_scale, self.weight_zero
        return int4_linear_codes(codes, scale, *weight, bias, group=self.scheme.group, dtype=dtype)

    def _multiply_packed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        scheme = self.scheme
        assert scheme.group is not None
        if scheme.activations == "none" or (scheme.activations, scheme.activation_bits) == ("token", 8):
            return int4_linear(
                tokens, self.weight, self.weight_scale, self.weight_zero, self.bias, group=scheme.group,
                activations=scheme.activations, dtype=dtype,  # type: ignore[arg-type]
            )  # fmt: skip
        codes, scale = quantize_activations(tokens.reshape(-1, tokens.shape[-1]), scheme, self.input_scale)
        return self.multiply_codes(codes, scale, self.bias, dtype).view(*tokens.shape[:-1], -1)

    def extra_repr(self) -> str:
        bits = f"W{self.scheme.weight_bits}A{self.scheme.activation_bits}"
        return f"{self.shape}, bias={self.bias is not None}, {bits}, activations={self.scheme.activations}"


def _unpack_again(layer: DeployedInt8, _: object) -> None:  # at the top of the module, so that layers can be pickled
    if layer.unpacked is not None:
        layer.keep_unpacked()
