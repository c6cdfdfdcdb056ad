"""LLM.int8 layers: bitsandbytes' `Linear8bitLt`, frozen, made safe to train through, save and load.

Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339. Weights have one scale an output row, activations one a token;
inputs (columns of the batch) with an outlier are multiplied in floating point, on the dequantized weight.

bitsandbytes 0.50 has habits that this corrects:

- On a CPU it trains through another product than it evaluates with: dequantized weights, and activations that are not
  quantized at all. Here the forward is the quantized one in both.
- Weight and scales move between the layer's parameter and its state at the first forward, and a layer that is not
  quantized yet cannot load a state dict that is. Here the codes are the parameter `weight`, the scales the buffer
  `SCB` (the largest magnitude of each row, in float32), from the start.
- It casts the bias in place to the dtype of whatever comes in, and its output is in the input's dtype under autocast
  too, which would hand float32 to the attention.
- It warns at every call that inputs are cast to float16, which is how it quantizes them; the warning is left out.
- On x86 with AVX-512 but without VNNI its product overflows without a warning. There it is refused.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from vit_efficient.errors import CapabilityError, UserError
from vit_efficient.kernels.int8_linear.op import cpu_int_mm_is_exact
from vit_efficient.quantization.select import Layer
from vit_efficient.quantization.stored import StoredBnb8
from vit_efficient.quantization.surgery import replace


class _NotTheCast(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "inputs will be cast" not in str(record.msg)


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_NotTheCast())


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """A frozen linear layer with int8 weights: (..., K) to (..., N).

    Make one with `of` (from a float layer) or `empty` (to load a state dict into).
    """

    SCB: Tensor
    deployed: Literal["linear", "patches"] = "linear"

    def __init__(self, inputs: int, outputs: int, bias: bool, *, threshold: float) -> None:
        super().__init__(inputs, outputs, bias, has_fp16_weights=False, threshold=threshold, device="meta")
        self._hold(torch.zeros(outputs, inputs, dtype=torch.int8), torch.zeros(outputs))
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False) if bias else None

    @classmethod
    def of(cls, layer: nn.Linear, *, threshold: float) -> FrozenLinear8bit:
        """Quantize a float layer where it is; the same weights give the same codes every time.

        CPU and GPU may round differently: quantize on the CPU where the result must not depend on the machine.
        """
        made = cls.empty((layer.out_features, layer.in_features), layer.bias is not None, threshold=threshold)
        made = made.to(layer.weight.device)
        # float16, as bitsandbytes has it: its GPU kernels take nothing else
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(layer.weight.detach().to(torch.float16))
        made._hold(codes, scales)
        if layer.bias is not None:
            made.bias = nn.Parameter(layer.bias.detach().to(torch.float32), requires_grad=False)
        return made.train(layer.training)

    @classmethod
    def empty(cls, shape: tuple[int, int], bias: bool, *, threshold: float) -> FrozenLinear8bit:
        """A layer of zeros with `shape` (N, K), to load a state dict into."""
        return cls(shape[1], shape[0], bias, threshold=threshold)

    def _hold(self, codes: Tensor, scales: Tensor) -> None:
        self.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
        self.register_buffer("SCB", scales)
        self._tie()

    def _tie(self) -> None:
        """Whoever dequantizes the weight (peft when it merges) looks for the scales at the parameter."""
        self.weight.CB, self.weight.SCB = None, self.SCB
        self.state.SCB = None

    def retie(self) -> None:
        """Make the codes bitsandbytes' own kind of parameter again, after something put a plain one there."""
        self._hold(self.weight.data, self.SCB)

    def _scales(self) -> Tensor:
        # Gathered under FSDP2, the weight is a plain parameter of the same codes, with nothing tied to it.
        if getattr(self.weight, "SCB", self.SCB) is not self.SCB:
            raise UserError(
                "The int8 weight of a layer was replaced without its scales, as peft does when it merges adapters "
                "into the layer itself. Merge with `python -m vit_efficient.export merge`."
            )
        return self.SCB

    def dequantized(self) -> Tensor:
        """The float32 weight (N, K) that the codes stand for."""
        weight: Tensor = bnb.functional.int8_vectorwise_dequant(self.weight.data, self._scales())
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not cpu_product_is_exact():
            raise CapabilityError(
                "quantization=bnb_int8: bitsandbytes multiplies int8 by AVX-512 here, and this processor lacks VNNI, "
                "without which the sums overflow. Use quantization=int8, which checks, or a GPU."
            )
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.threshold = self.weight.data, self._scales(), self.state.threshold
        state.has_fp16_weights = False
        state.is_training = False  # the quantized product in training too; gradients pass through it as well
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])  # of another number of dimensions bitsandbytes makes no matrix itself
        y: Tensor = bnb.matmul(rows, self.weight, bias=bias, state=state)
        return y.view(*x.shape[:-1], self.out_features)

    def to_deployed(self) -> FrozenLinear8bit:
        """Itself: the base is in int8 from the start."""
        return self

    def describe(self) -> StoredBnb8:
        """How it is stored."""
        return StoredBnb8(shape=tuple(self.weight.shape), threshold=self.state.threshold)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Scales and bias stay float32, whatever dtype the model is cast to; they follow it to its device."""
        scales, bias = self.SCB, None if self.bias is None else self.bias.data
        super()._apply(fn, recurse)
        if self.SCB.dtype != scales.dtype:
            self.SCB = scales.to(self.SCB.device)
        if bias is not None and self.bias is not None and self.bias.dtype != bias.dtype:
            self.bias.data = bias.to(self.bias.device)
        self._tie()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:  # type: ignore[no-untyped-def]
        self._scales()
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:  # type: ignore[no-untyped-def]
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:
            errors.append(f"{prefix}weight: it is {weight.dtype}, not the int8 codes of this layer.")
            return
        nn.Linear._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self._tie()


@functools.cache
def cpu_product_is_exact() -> bool:
    """Whether bitsandbytes' int8 product is right on this processor: it takes `torch._int_mm` wherever AVX-512 is."""
    return torch.backends.cpu.get_cpu_capability() != "AVX512" or cpu_int_mm_is_exact()


def quantize(model: nn.Module, layers: list[Layer], *, threshold: float) -> None:
    """Replace float linear layers by frozen int8 ones, in place.

    Raises:
        UserError: a layer is a convolution.
    """
    for layer in layers:
        if not isinstance(layer.module, nn.Linear):
            raise UserError(
                f"quantization=bnb_int8: {layer.name} is a convolution, which bitsandbytes has no int8 form of. "
                "Put its name or its role, patch_embed, into quantization.keep."
            )
    for layer in layers:
        replace(model, layer.name, FrozenLinear8bit.of(layer.module, threshold=threshold))  # type: ignore[arg-type]
    model.is_loaded_in_8bit = True  # type: ignore[assignment]  # peft reads it, and wraps wrongly without it
