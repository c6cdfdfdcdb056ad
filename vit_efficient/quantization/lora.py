"""Low-rank adapters by peft, on layers chosen by role. The timm model keeps its class; names gain ``base_layer``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.select import find_layers, vocabulary
from vit_efficient.quantization.stored import StoredAdapter

ADAPTED = ("qkv", "proj", "fc1", "fc2")
NAME = "default"  # what peft calls the only adapter that a layer has here


def store_in(model: nn.Module, dtype: torch.dtype, *, but: Collection[str] = ()) -> None:
    """Hold the linear layers of a frozen float model's blocks in `dtype`; run it under autocast to that dtype.

    The layers named in `but`, which will be trained, stay in float32.
    """
    for layer in find_layers(model):
        if layer.role in ADAPTED and layer.name not in but:
            layer.module.to(dtype)


def add_adapters(model: nn.Module, config: LoraConfig, *, but: Collection[str] = ()) -> list[str]:
    """Add adapters to `model` in place, and leave nothing trainable but them, and the head if `config.train_head`.

    A new adapter adds zero, so the first forward equals that of the base. Adapters are float32 whatever the base is:
    the optimizer's small steps would be lost in 16 bits, and they are small.

    Args:
        model: float, or with layers that are quantized already.
        config: which roles get adapters, and of what kind.
        but: layers that get none, because they are trained whole.

    Returns:
        The names of the modules that got one.

    Raises:
        UserError: a role in `config.targets` matches no layer; no layer is left for an adapter.
    """
    layers = find_layers(model)
    missing = [role for role in config.targets if not any(layer.role == role for layer in layers)]
    if missing:
        raise UserError(f"quantization.lora.targets: no layer has the role {missing[0]!r}.\n{vocabulary(layers)}")
    heads = [layer.module for layer in layers if layer.role == "head"]
    names = [layer.name for layer in layers if layer.role in config.targets and layer.name not in but]
    if not names:
        raise UserError(
            "quantization.critical names every layer that quantization.lora.targets would give an adapter. "
            "Name fewer, or train the whole model: quantization=none without quantization.lora."
        )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.dora,
        use_rslora=config.rslora,
    )
    inject(model, names, settings)
    if config.train_head:
        for head in heads:
            head.requires_grad_(True)
    return names


def inject(model: nn.Module, names: Sequence[str], settings: peft.LoraConfig) -> None:
    """Put adapters on exactly the modules named, in place, and freeze everything else."""
    settings.target_modules = list(names)
    peft.inject_adapter_in_model(settings, model, NAME)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(names), f"peft adapted {sorted(adapted ^ set(names))} besides or not"
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.to(torch.float32)


def inject_stored(model: nn.Module, adapters: Mapping[str, StoredAdapter]) -> None:
    """Empty adapters as a file describes them, to load its tensors into.

    Raises:
        CheckpointError: they differ among themselves.
    """
    kinds = set(adapters.values())
    if len(kinds) != 1:
        raise CheckpointError(f"The file's adapters are of different kinds: {', '.join(sorted(map(str, kinds)))}.")
    kind = kinds.pop()
    settings = peft.LoraConfig(r=kind.rank, lora_alpha=kind.alpha, use_dora=kind.dora, use_rslora=kind.rslora)
    inject(model, list(adapters), settings)


def describe(layer: LoraLayer) -> StoredAdapter:
    """What a file says of an adapter."""
    return StoredAdapter(
        rank=layer.r[NAME],
        alpha=layer.lora_alpha[NAME],
        dora=layer.use_dora[NAME],
        rslora=layer.use_rslora[NAME],
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's."""
    return ".lora_" in name


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters alone."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if is_adapter(name)}


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes: adapters, head, critical layers. The base is made again from its source."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `trainable_state` gave into a model built by the same recipe.

    Raises:
        CheckpointError: names or shapes differ.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unexpected {name}" for name in state if name not in own]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, the model's is {tuple(parameter.shape)}"
        for name, parameter in own.items()
        if name in state and state[name].shape != parameter.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            "The trained parameters do not fit this model: " + "; ".join(wrong[:8]) + more + ". "
            "Use the recipe that the checkpoint was trained with."
        )
    for name, parameter in own.items():
        parameter.copy_(state[name])
