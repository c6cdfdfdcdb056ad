"""A deployed model as named tensors and text: what one self-describing safetensors file holds.

Integer layers give int8 codes (`weight`), `weight_scale` and `bias`; 4-bit layers their packed weight and the parts of
its quantization state; adapters stay apart from their base; everything else is floating point. The metadata says which
layers are what, so that a freshly created timm model can be given the same form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from vit_efficient.errors import CheckpointError
from vit_efficient.quantization.stored import (
    ADAPTERS,
    ATTENTION,
    LAYERS,
    QuantizedLayer,
    StoredAdapter,
    StoredAttention,
    StoredFp8Attention,
    StoredLayer,
)
from vit_efficient.quantization.stored_attention import describe_attention, prepare_attention
from vit_efficient.quantization.surgery import replace

FORMAT = "vit_efficient"
VERSION = "2"


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
        if isinstance(module, QuantizedLayer):
            own = {key for key in tensors if key.startswith(f"{name}.")}
            deployed = module.to_deployed().state_dict()
            tensors = {key: tensor for key, tensor in tensors.items() if key not in own}
            tensors |= {f"{name}.{key}": tensor.detach() for key, tensor in deployed.items()}
            layers[name] = module.describe()  # type: ignore[assignment]
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and dtype != torch.float32:
            tensors |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in module.state_dict().items()}
        elif hasattr(module, "lora_A"):
            from vit_efficient.quantization import lora

            adapters[name] = lora.describe(module)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layers": LAYERS.dump_json(layers).decode(),
        "adapters": ADAPTERS.dump_json(adapters).decode(),
        "attention": ATTENTION.dump_json(describe_attention(model)).decode(),
    }
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata


def load_deployed(model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Give a freshly created float model the deployed form that `deployed_state` described, in place, and its weights.

    The attention must be swapped before if it was in the model that was saved and reads weights without calling layers.
    Nothing in the result is meant to be trained.

    Raises:
        CheckpointError: not such a file, a later version of it, or one of another model (saying which names differ).
    """
    layers, adapters, attention = _read(metadata)
    names = {name for name, _ in model.named_modules()}
    strangers = sorted({*(name.removesuffix(".base_layer") for name in layers), *adapters} - names)
    if strangers:
        raise CheckpointError(f"The file is of another model: this one has no layer {_listed(strangers)}.")
    for name, layer in layers.items():
        _prepare(model, name, layer, tensors)
    prepare_attention(model, attention, tensors)
    if adapters:
        from vit_efficient.quantization import lora

        lora.inject_stored(model, adapters)
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


def digest(tensors: Mapping[str, Tensor], description: Mapping[str, str]) -> str:
    """sha256 of a file's meaning: its description (but for the digest itself), and every tensor's name, type, shape
    and bytes. A flipped bit anywhere changes it."""
    found = hashlib.sha256()
    for key in sorted(description.keys() - {"digest"}):
        found.update(f"{key}={description[key]}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_layers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """See that every layer of a description can be loaded again, before it is written.

    Raises:
        CheckpointError: one cannot, for want of calibration for example.
    """
    for name, layer in LAYERS.validate_json(metadata["layers"]).items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        if problem := layer.check(own):
            raise CheckpointError(f"The model cannot be written: {name} ({layer.kind}): {problem}.")


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors, which is the size of their file but for its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _read(
    metadata: Mapping[str, str],
) -> tuple[dict[str, StoredLayer], dict[str, StoredAdapter], dict[str, StoredAttention | StoredFp8Attention]]:
    if metadata.get("format") != FORMAT:
        raise CheckpointError("The file does not say that it is a deployed model of vit_efficient (`format`).")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"The file is of version {metadata.get('version')!r}; this program reads version {VERSION}."
        )
    try:
        return (
            LAYERS.validate_json(metadata["layers"]),
            ADAPTERS.validate_json(metadata["adapters"]),
            ATTENTION.validate_json(metadata["attention"]),
        )
    except (KeyError, ValidationError) as error:
        raise CheckpointError(f"The file's description of its layers cannot be read: {error}") from error


def _prepare(model: nn.Module, name: str, layer: StoredLayer, tensors: Mapping[str, Tensor]) -> None:
    """Put an empty deployed layer where the float one is. Under an adapter its name ends in `base_layer`."""
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    if problem := layer.check(own):
        raise CheckpointError(
            f"The tensors of {name} are not what the file says of them ({layer.kind} {layer.shape}): {problem}."
        )
    device = next(model.parameters()).device
    if layer.kind in ("nf4", "fp4"):
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # peft reads it, and wraps wrongly without it
    if layer.kind == "bnb_int8":
        model.is_loaded_in_8bit = True  # type: ignore[assignment]  # the same
    replace(model, name.removesuffix(".base_layer"), layer.build("bias" in own).to(device).train(model.training))


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
