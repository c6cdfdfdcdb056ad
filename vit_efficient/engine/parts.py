"""The parts of a deployed model that compute on codes, and what the definitions in `kernels` make of a part's input.

A part is an integer layer, an fp8 layer, or the attention of a block if that multiplies codes. Legend: M tokens, K
inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.kernels.fp8_attention import reference as fp8_attention
from vit_efficient.kernels.fp8_linear import reference as fp8
from vit_efficient.kernels.int8_attention import op as attention_op
from vit_efficient.kernels.int8_attention import reference as attention
from vit_efficient.kernels.int8_linear import reference
from vit_efficient.kernels.int8_linear.op import output_dtype
from vit_efficient.quantization.fp8_attention import Fp8Attend
from vit_efficient.quantization.fp8_layers import DeployedFp8
from vit_efficient.quantization.int8_attention import Int8Attend, code_attention
from vit_efficient.quantization.int8_layers import DeployedInt8, to_patches

Layer = DeployedInt8 | DeployedFp8
Part = Layer | Int8Attend | Fp8Attend

FLOAT32 = 1e-5  # of an output's norm: float32 sums in another order
FP8_UNITS, FP8_FAST = 1e-3, 1e-2  # the same on fp8 matrix units, which sum in fewer bits
E4M3_LOGITS = 1.5e-2  # logits of e4m3 operands that two programs rotate in another order, and sum in fewer bits
E4M3_WEIGHTS = 5e-2  # attention weights that two programs round to e4m3 each in its own way (`attention_values.weigh`)


@dataclass(frozen=True)
class Inputs:
    """What a part is given: a layer its input, attention queries, keys and values and how to attend."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any]


def integer_layers(model: nn.Module) -> dict[str, DeployedInt8]:
    """The deployed layers that multiply integers, by name; not those whose weights alone are quantized."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, DeployedInt8) and module.scheme.activations != "none"
    }


def fp8_layers(model: nn.Module) -> dict[str, DeployedFp8]:
    """The deployed fp8 layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DeployedFp8)}


def code_layers(model: nn.Module) -> dict[str, Layer]:
    """All layers that multiply codes, by name, in the model's order."""
    found = integer_layers(model) | fp8_layers(model)
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def code_parts(model: nn.Module) -> dict[str, Part]:
    """All parts, by name; attention by that of its attention module."""
    return {**code_layers(model), **code_attention(model)}


def output_bound(part: Part) -> float | None:
    """How far a sound backend's output may be from the definition's, of its norm; None: not at all."""
    if isinstance(part, DeployedInt8):
        return None  # integer sums are exact, and the epilogue's order is written
    if isinstance(part, Int8Attend):
        # Softmax and the values' product are float sums. A kernel rounds weights to e4m3 against another maximum.
        return E4M3_WEIGHTS if part.values == "fp8" else FLOAT32
    if isinstance(part, Fp8Attend):
        return E4M3_WEIGHTS if part.values == "fp8" else E4M3_LOGITS
    return FP8_FAST if part.scheme.accumulation == "fast" else FP8_UNITS


def definition(part: Part, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the definition makes of a part's input.

    Returns:
        The codes that enter its product, int8 (of fp8 their `ordinals`), and its output in `dtype`: (M, K) and (M, N)
        of a layer; of attention the codes of queries, keys and values (none of float ones) in a row, and (B, H, N, F).
    """
    if isinstance(part, Int8Attend):
        with torch.autocast(inputs.tensors[0].device.type, enabled=False):  # which would round the sums
            return _attention(part, inputs, dtype)
    if isinstance(part, Fp8Attend):
        with torch.autocast(inputs.tensors[0].device.type, enabled=False):
            return _fp8_attention(part, inputs, dtype)
    (x,) = inputs.tensors
    q_MK, scale_M1 = quantized(part, x)
    return comparable(q_MK), product(part, q_MK, scale_M1, dtype)


def quantized(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the definition quantizes a layer's input to: codes (M, K) and their scales (M, 1) or (1, 1)."""
    with torch.autocast(x.device.type, enabled=False):
        tokens = to_patches(x, layer.shape[2:])[0] if layer.deployed == "patches" else x
        x_MK = tokens.reshape(-1, tokens.shape[-1])
        if layer.shift is not None:
            x_MK = x_MK.to(torch.float32) - layer.shift
        if isinstance(layer, DeployedFp8):
            return fp8.quantize_activations(x_MK, layer.scheme, layer.input_scale)
        if layer.smooth is not None:
            x_MK = x_MK.to(torch.float32) / layer.smooth
        return reference.quantize_activations(x_MK, layer.scheme, layer.input_scale)


def product(layer: Layer, q_MK: Tensor, scale_M1: Tensor, dtype: torch.dtype) -> Tensor:
    """What the definition makes of codes: the layer's output (M, N) in `dtype`."""
    with torch.autocast(q_MK.device.type, enabled=False):
        if isinstance(layer, DeployedFp8):
            sum_MN = fp8.product(q_MK, layer.weight.flatten(1))
            return fp8.epilogue(sum_MN, scale_M1, layer.weight_scale.unsqueeze(1), layer.bias, dtype)
        scheme, weight_NK = layer.scheme, layer.weight_codes()
        if scheme.group is None:
            sum_MN, scale_N = reference.int8_matmul(q_MK, weight_NK), layer.weight_scale.reshape(-1)
        else:
            sum_MN = reference.grouped_matmul(q_MK, weight_NK, layer.weight_scale, scheme.group)
            scale_N = torch.ones_like(layer.weight_scale[:, 0])
        return reference.epilogue(sum_MN, scale_M1, scale_N, layer.bias, dtype)


def _attention(attend: Int8Attend, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y_BHNF = attention.int8_attention(
        *inputs.tensors,
        bias=inputs.options.get("bias"),
        mask=inputs.options.get("mask"),
        scale=inputs.options["scale"],
        granularity=attend.granularity,
        scales=attend.scales,
        values=attend.values,
        keys=attend.keys,
        dtype=dtype,
    )
    return _attention_codes(attend, inputs, attention), y_BHNF


def _fp8_attention(attend: Fp8Attend, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    extras: dict[str, Any] = {name: inputs.options.get(name) for name in ("bias", "mask", "scale")}
    y_BHNF = fp8_attention.attend(*inputs.tensors, **extras, values=attend.values, dtype=dtype)
    return attention_codes(attend, inputs), y_BHNF


def attention_codes(attend: Int8Attend | Fp8Attend, inputs: Inputs) -> Tensor:
    """The codes of queries, keys and values as the running attention makes them, in a row."""
    if isinstance(attend, Fp8Attend):
        q_BHNE, k_BHME, v_BHMF = inputs.tensors
        made = fp8_attention.operands(q_BHNE, k_BHME)
        v = [attention.quantize_values(v_BHMF, "fp8")[0]] if attend.values == "fp8" else []
        return torch.cat([ordinals(codes).reshape(-1) for codes in (made.q, made.k, *v)])
    return _attention_codes(attend, inputs, attention_op)


def _attention_codes(attend: Int8Attend, inputs: Inputs, by: ModuleType) -> Tensor:
    """The same as a module quantizes: e4m3 values as `ordinals`; float ones have no codes."""
    q_BHNE, k_BHME, v_BHMF = inputs.tensors
    q_scale, k_scale, v_scale = attend.scales or (None, None, None)
    codes = [by.quantize(q_BHNE, attend.granularity, q_scale)[0]]
    codes.append(by.quantize_keys(k_BHME, attend.keys, attend.granularity, k_scale)[0])
    if attend.values != "float":
        v, _ = by.quantize_values(v_BHMF, attend.values, attend.granularity, v_scale)
        codes.append(ordinals(v) if attend.values == "fp8" else v)
    return torch.cat([one.reshape(-1) for one in codes])


def attention_dtype(inputs: Inputs) -> torch.dtype:
    """Of an attention's output."""
    return output_dtype(inputs.tensors[2])


def comparable(codes: Tensor) -> Tensor:
    """Codes as int8, whose differences count steps: integers as they are, of e4m3 the `ordinals`."""
    return codes if codes.dtype == torch.int8 else ordinals(codes)


def ordinals(codes: Tensor) -> Tensor:
    """e4m3 codes as integers, int8, in the order of their values: neighbours differ by one, both zeros are 0."""
    bits = codes.contiguous().view(torch.uint8).to(torch.int16)
    size = bits & 0x7F
    return torch.where(bits > 0x7F, -size, size).to(torch.int8)
