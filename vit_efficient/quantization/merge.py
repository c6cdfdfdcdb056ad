"""Merging: adapters and their base become one float32 layer each. Legend: N outputs, K inputs, R rank.

With the base's weight W (N, K), the adapter's A (R, K) and B (N, R), and the scale s:

    LoRA     W' = W + s B A,  s = alpha / R           Hu et al. 2021, arXiv:2106.09685, equation 3
    rsLoRA   the same,        s = alpha / sqrt(R)     Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2
    DoRA     W' = m (W + s B A) / |W + s B A|         Liu et al. 2024, arXiv:2402.09353, equation 5; m (N,), row by row

A base in 4 or 8 bits is dequantized from its state dict, never from the parameter that it computes with: bitsandbytes
repacks the latter in place on some CPUs, and a merge that read it would give garbage without a warning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vit_efficient.errors import UserError
from vit_efficient.quantization.base import CRITICAL, named
from vit_efficient.quantization.lora import NAME
from vit_efficient.quantization.stored import QuantizedLayer
from vit_efficient.quantization.surgery import replace
from vit_efficient.quantization.unfreeze import NORMS

if TYPE_CHECKING:
    from vit_efficient.quantization.config import QuantizationConfig


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        adapters: layers whose adapter went into their weight.
        dequantized: quantized layers, with or without an adapter, that are float now.
        exact: whether nothing but float rounding separates the answers before and after. False for a base that
            quantizes its inputs too (LLM.int8): a float layer does not.
    """

    adapters: int
    dequantized: int
    exact: bool


@torch.no_grad()
def merge(model: nn.Module) -> Merged:
    """Make a model with adapters a plain one in float32, in place. Hooks of the layers replaced are lost.

    Raises:
        UserError: there are no adapters; a weight cannot be dequantized; a merged weight is not finite.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not adapted:
        raise UserError("This model has no adapters, so there is nothing to merge.")
    bases = [module.get_base_layer() for module in adapted.values()]
    alone = {name: module for name, module in model.named_modules() if _is_quantized(module) and module not in bases}
    quantized = [*(base for base in bases if _is_quantized(base)), *alone.values()]
    exact = not any(isinstance(layer, bnb.nn.Linear8bitLt) for layer in quantized)
    for name, adapter in adapted.items():
        replace(model, name, _linear(merged_weight(adapter, name), adapter.get_base_layer()))
    for name, layer in alone.items():
        replace(model, name, _linear(float_weight(layer, name), layer))
    model.float()
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # for peft, which would look for such layers
        if hasattr(model, flag):
            delattr(model, flag)
    return Merged(len(adapted), len(quantized), exact)


@torch.no_grad()
def merged_weight(adapter: LoraLayer, name: str = "the layer") -> Tensor:
    """The weight (N, K), in float32, of the one layer that does what a base and its adapter do.

    Raises:
        UserError: peft has merged the adapter into its base already; the base cannot be dequantized; the result is not
            finite.
    """
    if adapter.merged:
        raise UserError(f"{name}: peft has merged this adapter into its base already; merging it twice adds it twice.")
    weight = float_weight(adapter.get_base_layer(), name)
    a, b = adapter.lora_A[NAME].weight.float(), adapter.lora_B[NAME].weight.float()
    weight = weight + adapter.scaling[NAME] * (b @ a)
    if adapter.use_dora[NAME]:
        length = adapter.lora_magnitude_vector[NAME].weight.float()
        weight = weight * (length / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
    if not weight.isfinite().all():
        raise UserError(f"{name}: the merged weight has values that are not finite; the adapter is damaged.")
    return weight


@torch.no_grad()
def float_weight(layer: nn.Module, name: str = "the layer") -> Tensor:
    """The weight (N, K) of a layer in float32; dequantized, as the state dict has it, where it is quantized.

    Raises:
        UserError: it is of a kind that cannot be dequantized, or bitsandbytes has repacked it.
    """
    if isinstance(layer, bnb.nn.Linear4bit) and layer.weight.quant_state is not None:
        return _from_4bit(layer, name)
    state = layer.state_dict()
    weight = state.get("weight")
    if isinstance(layer, bnb.nn.Linear8bitLt) and weight is not None and weight.dtype == torch.int8:
        return weight.float() * (state["SCB"].float() / 127).unsqueeze(1)
    if isinstance(layer, (nn.Linear, nn.Conv2d)) and weight is not None and weight.is_floating_point():
        return weight.to(torch.float32, copy=True)
    raise UserError(f"{name}: a {type(layer).__name__} cannot be made float again.")


def _from_4bit(layer: bnb.nn.Linear4bit, name: str) -> Tensor:
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise UserError(
            f"{name}: bitsandbytes has repacked this 4-bit weight for the CPU in an evaluation forward, and rounded "
            "its scales. Merge before the first forward in evaluation mode, or use this package's 4-bit layers "
            "(quantization=int4), which are never repacked."
        )
    stored = layer.state_dict()
    parts = {key: value for key, value in stored.items() if key.startswith("weight.")}
    state = bnb.functional.QuantState.from_dict(parts, device=stored["weight"].device)
    state.dtype = torch.float32
    weight: Tensor = bnb.functional.dequantize_4bit(stored["weight"], state)
    return weight


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (QuantizedLayer, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))


def _linear(weight_NK: Tensor, base: nn.Module) -> nn.Linear:
    """A frozen float layer with that weight and the bias of `base`."""
    outputs, inputs = weight_NK.shape
    bias = base.bias
    layer = nn.Linear(inputs, outputs, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight_NK, requires_grad=False)
    if isinstance(bias, Tensor):
        layer.bias = nn.Parameter(bias.detach().to(torch.float32, copy=True), requires_grad=False)
    return layer.train(base.training)


def without_adapters(config: QuantizationConfig) -> QuantizationConfig:
    """The scheme of a recipe that trained adapters, as it quantizes a merged model.

    Layers that were `critical` were not quantized, and stay so.

    Raises:
        UserError: the recipe quantizes nothing.
    """
    if config.name == "none":
        raise UserError("--requantize: this run's base is not quantized (quantization=none). Merge without it.")
    keep = list(named(config.keep))
    if getattr(config, "train", None) == "critical":
        keep += [entry for entry in config.critical if entry not in (*keep, NORMS)]  # type: ignore[union-attr]
    plain = {"lora": None, "base": None, "train": "lora", "critical": CRITICAL.default, "distill": None}
    return config.model_copy(update={**plain, "keep": tuple(keep)})
