"""What is trained besides adapters: the layers that `quantization.train` and `quantization.critical` name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vit_efficient.errors import UserError
from vit_efficient.quantization.select import OPTIONAL, find_layers, matching, vocabulary
from vit_efficient.quantization.stored import QuantizedLayer

NORMS = "norms"


def critical_layers(model: nn.Module, critical: Sequence[str]) -> dict[str, str]:
    """The modules that `critical` names, each with the entry that names it first.

    An entry means the same layers as in `keep`; ``norms`` means every normalisation layer. Ask before layers are
    quantized and before adapters are added, as both rename.

    Raises:
        UserError: an entry matches nothing.
    """
    layers = find_layers(model)
    reasons: dict[str, str] = {}
    for entry in critical:
        found = _norms(model) if entry == NORMS else [layer.name for layer in matching(layers, entry)]
        if not found and entry not in (*OPTIONAL, NORMS):
            words = vocabulary(layers).replace("last_block\n", f"last_block, {NORMS}\n")
            raise UserError(f"quantization.critical: {entry!r} matches no layer of this model.\n{words}")
        for name in found:
            reasons.setdefault(name, entry)
    return reasons


def unfreeze(model: nn.Module, reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Train the modules named, whole. Returns (name, reason) of each."""
    for name in reasons:
        model.get_submodule(name).requires_grad_(True)
    return list(reasons.items())


def unfreeze_all(model: nn.Module) -> list[tuple[str, str]]:
    """Train every parameter that is in floating point; a quantized layer stays frozen, its bias included.

    Returns:
        (name, ``all``) of each module that has such parameters of its own; the model itself is ``model``.
    """
    trained = []
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own or isinstance(module, QuantizedLayer) or all(parameter.requires_grad for parameter in own):
            continue
        for parameter in own:
            parameter.requires_grad_(True)
        trained.append((name or "model", "all"))
    return trained


def _norms(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and next(module.parameters(recurse=False), None) is not None
    ]
