"""A deployed model as named tensors and text: what one self-describing safetensors file holds.

Integer layers give int8 codes (`weight`), `weight_scale` and `bias`; 4-bit layers their packed weight and the parts of
its quantization state; adapters stay apart from their base; everything else is floating point. The metadata says which
layers are what, so that a freshly created timm model can be given the same form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor, nn

from vit_efficient.config import Config
from vit_efficient.errors import CheckpointError
from vit_efficient.quantization.int8_layers import DeployedInt8, Int8Linear, Int8Patches
from vit_efficient.quantization.surgery import replace

FORMAT = "vit_efficient"
VERSION = "1"


class StoredLayer(Config):
    """How a quantized layer is stored; `shape` is that of its float weight."""

    kind: Literal["int8", "nf4", "fp4"]
    shape: tuple[PositiveInt, ...]
    double_quant: bool = False
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class StoredAdapter(Config):
    """A low-rank adapter: its output is scaled by alpha / rank."""

    rank: PositiveInt
    alpha: PositiveFloat


LAYERS = TypeAdapter(dict[str, StoredLayer])
ADAPTERS = TypeAdapter(dict[str, StoredAdapter])


def deployed_state(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The deployed form of a model that is trained, or deployed already; the model itself does not change.

    Args:
        model: as a quantization backend's `apply` or `finalize` left it.
        dtype: the precision of the run. If it is a half, float linear layers and convolutions are stored in it, as
            autocast would round them anyway; all else (norms, embeddings, scales) keeps its own.

    Returns:
        Tensors by name, on the CPU (they may share the model's memory), and metadata for a safetensors header.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    layers: dict[str, StoredLayer] = {}
    adapters: dict[str, StoredAdapter] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Int8Linear, Int8Patches, DeployedInt8)):
            deployed = module if isinstance(module, DeployedInt8) else DeployedInt8.of(module)
            tensors |= {f"{name}.{key}": tensor for key, tensor in deployed.state_dict().items()}
            layers[name] = StoredLayer(kind="int8", shape=tuple(deployed.weight.shape))
        elif _is_4bit(module):
            layers[name] = _describe_4bit(module)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and dtype != torch.float32:
            tensors |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in module.state_dict().items()}
        elif hasattr(module, "lora_A"):
            adapters[name] = StoredAdapter(rank=module.r["default"], alpha=module.lora_alpha["default"])
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layers": LAYERS.dump_json(layers).decode(),
        "adapters": ADAPTERS.dump_json(adapters).decode(),
    }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata


def load_deployed(model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Give a freshly created float model the deployed form that `deployed_state` described, in place, and its weights.

    The attention must be swapped before if it was in the model that was saved and reads weights without calling layers.
    Nothing in the result is meant to be trained.

    Raises:
        CheckpointError: not such a file, a later version of it, or one of another model (saying which names differ).
    """
    layers, adapters = _read(metadata)
    names = {name for name, _ in model.named_modules()}
    strangers = sorted({*(name.removesuffix(".base_layer") for name in layers), *adapters} - names)
    if strangers:
        raise CheckpointError(f"The file is of another model: this one has no layer {_listed(strangers)}.")
    for name, layer in layers.items():
        _prepare(model, name, layer, tensors)
    if adapters:
        _prepare_adapters(model, adapters)
    try:
        missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:  # how torch reports shapes that differ
        raise CheckpointError(f"The file does not fit this model. {error}") from error
    if missing or unexpected:
        parts = [
            f"{what} {_listed(sorted(which))}"
            for what, which in (("it lacks", missing), ("it has", unexpected))
            if which
        ]
        raise CheckpointError(f"The file is of another model: {'; '.join(parts)}.")
    model.requires_grad_(False)


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, which is the size of their file but for its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _is_4bit(module: nn.Module) -> bool:
    return getattr(module, "quant_state", None) is not None


def _describe_4bit(module: Any) -> StoredLayer:
    state = module.quant_state
    dtype = str(module.compute_dtype).removeprefix("torch.")
    return StoredLayer(
        kind=state.quant_type,
        shape=tuple(state.shape),
        double_quant=state.nested,
        compute_dtype=dtype,
    )


def _read(metadata: Mapping[str, str]) -> tuple[dict[str, StoredLayer], dict[str, StoredAdapter]]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError("The file does not say that it is a deployed model of vit_efficient (`format`).")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"The file is of version {metadata.get('version')!r}; this program reads version {VERSION}. Update it."
        )
    try:
        return LAYERS.validate_json(metadata["layers"]), ADAPTERS.validate_json(metadata["adapters"])
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"The file's description of its layers cannot be read: {error}") from error


def _prepare(model: nn.Module, name: str, layer: StoredLayer, tensors: Mapping[str, Tensor]) -> None:
    """Put an empty deployed layer where the float one is. Under an adapter its name ends in `base_layer`."""
    weight = tensors.get(f"{name}.weight")
    size = math.prod(layer.shape)
    expected = (torch.int8, size) if layer.kind == "int8" else (torch.uint8, (size + 1) // 2)
    if weight is None or (weight.dtype, weight.numel()) != expected:
        raise CheckpointError(
            f"{name}.weight in the file is not what its description says: {layer.kind} {layer.shape}."
        )
    place = name.removesuffix(".base_layer")
    device, bias = next(model.parameters()).device, f"{name}.bias" in tensors
    deployed: nn.Module
    if layer.kind == "int8":
        deployed = DeployedInt8(layer.shape, bias)
    else:
        from vit_efficient.quantization.int4_layers import FrozenLinear4bit

        deployed = FrozenLinear4bit.empty(
            layer.shape, bias, type=layer.kind, double_quant=layer.double_quant,  # type: ignore[arg-type]
            compute_dtype=getattr(torch, layer.compute_dtype),
        )  # fmt: skip
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
    replace(model, place, deployed.to(device).train(model.training))


def _prepare_adapters(model: nn.Module, adapters: dict[str, StoredAdapter]) -> None:
    from vit_efficient.quantization import lora

    settings = {(adapter.rank, adapter.alpha) for adapter in adapters.values()}
    if len(settings) != 1:
        raise CheckpointError(f"The file's adapters have differing ranks or scales, {sorted(settings)}.")
    rank, alpha = settings.pop()
    lora.inject(model, list(adapters), rank=rank, alpha=alpha)


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
