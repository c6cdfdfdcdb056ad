"""4-bit layers: bitsandbytes' `Linear4bit`, frozen, made safe to evaluate, save and load.

bitsandbytes 0.50 has three habits that this corrects:

- On a CPU with AVX512-BF16 an evaluation forward repacks the weight in place for a bfloat16 kernel. Whatever reads
  the weight directly afterwards (a merge, an export) gets garbage without a warning, and evaluation computes in
  another precision than training. The repacking is turned off.
- Its layers write the parts of their quantization state into a state dict but cannot read them back.
- It returns the dtype of its input under autocast too, which would hand float32 to the attention.
"""

from __future__ import annotations

from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from vit_efficient.errors import UserError
from vit_efficient.quantization.nf4 import BLOCK, quantize_4bit
from vit_efficient.quantization.select import Layer
from vit_efficient.quantization.stored import StoredBnb4
from vit_efficient.quantization.surgery import replace

# Entries that a layer adds to a state dict beside `weight` and `bias`.
STATE_PREFIX = "weight."


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """A frozen linear layer with 4-bit weights: (..., K) to (..., N), computed in `compute_dtype`.

    Make one with `of` (from a float layer) or `empty` (to load a state dict into).
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, *, type: str, double_quant: bool, compute_dtype: torch.dtype
    ) -> None:
        options = {"compute_dtype": compute_dtype, "compress_statistics": double_quant, "quant_type": type}
        super().__init__(inputs, outputs, bias, device="meta", **options)
        self.support_avx512bf16_for_cpu = False

    @classmethod
    def of(cls, layer: nn.Linear, *, type: str, double_quant: bool, compute_dtype: torch.dtype) -> FrozenLinear4bit:
        """Quantize a float layer where it is, from float32; the same weights give the same bits every time.

        CPU and GPU may round differently: quantize on the CPU where the result must not depend on the machine.
        """
        made = cls(
            layer.in_features, layer.out_features, layer.bias is not None,
            type=type, double_quant=double_quant, compute_dtype=compute_dtype,
        )  # fmt: skip
        made._hold(*quantize_4bit(layer.weight.detach(), type, double_quant))
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().to(compute_dtype), requires_grad=False)
        return made.train(layer.training)

    @classmethod
    def empty(
        cls, shape: tuple[int, int], bias: bool, *, type: str, double_quant: bool, compute_dtype: torch.dtype
    ) -> FrozenLinear4bit:
        """A layer of zeros with `shape` (N, K), to load a state dict into."""
        source = nn.utils.skip_init(nn.Linear, shape[1], shape[0], bias)
        for parameter in source.parameters():
            nn.init.zeros_(parameter)
        return cls.of(source, type=type, double_quant=double_quant, compute_dtype=compute_dtype)

    def _hold(self, packed: Tensor, state: bnb.functional.QuantState) -> None:
        state.dtype = self.compute_dtype  # what the backward dequantizes to
        self.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=BLOCK,
            compress_statistics=state.nested, quant_type=state.quant_type, bnb_quantized=True, module=self,
        )  # fmt: skip
        self.quant_state = state

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y = bnb.matmul_4bit(x.to(self.compute_dtype), self.weight, bias=bias, quant_state=self.quant_state)
        return y.to(x.dtype)

    def retie(self) -> None:
        """Make the packed weight bitsandbytes' own kind of parameter again, after something put a plain one there."""
        self.quant_state.to(self.weight.device)
        self._hold(self.weight.data, self.quant_state)

    @property
    def deployed(self) -> Literal["linear", "patches"]:
        return "linear"

    def to_deployed(self) -> FrozenLinear4bit:
        """Itself: the base is in 4 bits from the start."""
        return self

    def describe(self) -> StoredBnb4:
        """How it is stored."""
        state = self.quant_state
        dtype: Any = str(self.compute_dtype).removeprefix("torch.")
        return StoredBnb4(
            kind=state.quant_type, shape=tuple(state.shape), double_quant=state.nested, compute_dtype=dtype
        )

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        inner = prefix + STATE_PREFIX
        parts = {key: value for key, value in state_dict.items() if key.startswith(inner)}
        rest = {key: value for key, value in state_dict.items() if key not in parts}
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weight = rest.get(prefix + "weight")
        if weight is None and not parts:
            super()._load_from_state_dict(rest, prefix, *arguments)  # reports what is missing
            return
        try:
            state = self._read_state({key[len(prefix) :]: value for key, value in parts.items()})
        except (ValueError, KeyError, AssertionError) as error:
            error_msgs.append(f"{prefix}weight: not a {self.weight.quant_type} weight of this shape ({error}).")
            return
        super()._load_from_state_dict(rest, prefix, *arguments)
        self._hold(self.weight.data, state)

    def _read_state(self, parts: dict[str, Any]) -> bnb.functional.QuantState:
        state = bnb.functional.QuantState.from_dict(parts, device=self.weight.device)
        expected = (torch.Size((self.out_features, self.in_features)), self.weight.quant_type)
        if (state.shape, state.quant_type) != expected:
            raise ValueError(f"it is {state.quant_type} {tuple(state.shape)}, not {expected[1]} {tuple(expected[0])}")
        return state


def quantize(
    model: nn.Module, layers: list[Layer], *, type: str, double_quant: bool, compute_dtype: torch.dtype
) -> None:
    """Replace float linear layers by frozen 4-bit ones, in place.

    Raises:
        UserError: a layer is a convolution.
    """
    for layer in layers:
        if not isinstance(layer.module, nn.Linear):
            raise UserError(
                f"quantization=int4: {layer.name} is a convolution, which has no 4-bit form. "
                "Put its name or its role, patch_embed, into quantization.keep."
            )
    for layer in layers:
        options: dict[str, Any] = {"type": type, "double_quant": double_quant, "compute_dtype": compute_dtype}
        replace(model, layer.name, FrozenLinear4bit.of(layer.module, **options))  # type: ignore[arg-type]
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft reads it, and wraps wrongly without it
