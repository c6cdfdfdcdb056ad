"""Which layers of a Vision Transformer are quantized, by what they do and not by what they are called.

A layer's role follows from where it sits: the projections of an attention module are ``qkv`` (fused, or split into q,
k, v) and ``proj``; those of an MLP are ``fc1`` (plain or gated) and ``fc2``; the classifier is ``head``; what turns
pixels into tokens is ``patch_embed``. Linear layers that are none of these are ``other`` and stay as they are.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from vit_efficient.errors import UserError
from vit_efficient.quantization.base import named

Role = Literal["qkv", "proj", "fc1", "fc2", "patch_embed", "head", "other"]
ROLES: tuple[str, ...] = get_args(Role)
# Roles that some models do not have (a feature extractor has no head): keeping them is never a mistake.
OPTIONAL = ("patch_embed", "head")

# Children of an attention module and of an MLP, by role. A module is one or the other if it has a child of each role.
ATTENTION = {
    "qkv": ("qkv", "q_proj", "k_proj", "v_proj", "q", "k", "v", "kv", "gate"),
    "proj": ("proj", "out_proj"),
}
MLP = {"fc1": ("fc1", "fc1_g", "fc1_x", "w12", "w1", "w2"), "fc2": ("fc2", "w3")}


@dataclass(frozen=True)
class Layer:
    """A layer that could be quantized. `block` counts from 0; None outside the blocks."""

    name: str
    module: nn.Module
    role: Role
    block: int | None

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.numel()

    @property
    def kind(self) -> str:
        """``linear``, or ``patches`` for a convolution whose kernel is its stride: a linear layer on patches."""
        return "patches" if is_patches(self.module) else "linear"


@dataclass(frozen=True)
class Kept:
    """A layer that stays in high precision, and the entry of `keep` or the property that is why."""

    layer: Layer
    reason: str


@dataclass(frozen=True)
class Selection:
    quantized: list[Layer]
    kept: list[Kept]


def find_layers(model: nn.Module) -> list[Layer]:
    """All linear layers, and the patch-embedding convolution, of a timm Vision Transformer in the order of its modules.

    Attention may have been swapped; float, integer or 4-bit makes no difference. A convolution that is not a linear
    layer on patches (the stem of a hybrid model) is not listed.
    """
    modules = dict(model.named_modules())
    roles = _roles(model, modules)
    return [
        Layer(name, module, roles.get(name, "other"), block_index(name))
        for name, module in modules.items()
        if is_linear(module) or (is_patches(module) and roles.get(name) == "patch_embed")
    ]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or getattr(module, "deployed", None) == "linear"


def is_patches(module: nn.Module) -> bool:
    """Whether a module is a convolution that cuts its input into patches that do not overlap."""
    if getattr(module, "deployed", None) == "patches":
        return True
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == tuple(module.stride)
        and set(module.dilation) == {1}
        and module.padding in (0, (0, 0), "valid")
        and module.groups == 1
    )


def block_index(name: str) -> int | None:
    """``blocks.3.attn.qkv`` is in block 3."""
    match = re.match(r"(?:.*\.)?blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


def _roles(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for name, module in modules.items():
        children = dict(module.named_children())
        for structure in (ATTENTION, MLP):
            found = {child: role for role, names in structure.items() for child in names if child in children}
            if set(found.values()) == set(structure):
                roles |= {f"{name}.{child}".lstrip("."): role for child, role in found.items()}  # type: ignore[misc]
    roles |= {name: "patch_embed" for name in modules if name.split(".")[0] == "patch_embed"}
    return roles | dict.fromkeys(_classifiers(model, modules), "head")


def _classifiers(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Names of the modules that timm's `get_classifier` returns (two for a distilled DeiT)."""
    if not hasattr(model, "get_classifier"):
        return
    heads = model.get_classifier()  # type: ignore[operator]
    wanted = {id(head) for head in (heads if isinstance(heads, (tuple, list)) else (heads,))}
    yield from (name for name, module in modules.items() if id(module) in wanted)


def matching(layers: Sequence[Layer], entry: str) -> list[Layer]:
    """The layers that one entry of `keep` means: a role, ``first_block``, ``last_block``, or a pattern of names.

    A pattern also means everything inside what it matches: ``blocks.3`` is ``blocks.3.*``.
    """
    if entry in ROLES:
        return [layer for layer in layers if layer.role == entry]
    if entry in ("first_block", "last_block"):
        blocks = {layer.block for layer in layers if layer.block is not None}
        wanted = {min(blocks) if entry == "first_block" else max(blocks)} if blocks else set()
        return [layer for layer in layers if layer.block in wanted]
    patterns = (entry, f"{entry}.*")
    return [layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns)]


def select(model: nn.Module, keep: Sequence[str]) -> Selection:
    """Divide the layers of `model` into those to quantize and those that `keep` names.

    Raises:
        UserError: `keep` is still `auto`; an entry of it matches nothing; nothing is left to quantize; an attention
            module computes its projection without calling the layer, so quantizing it would have no effect.
    """
    layers = find_layers(model)
    reasons = {layer.name: "other" for layer in layers if layer.role == "other"}
    for entry in named(keep):
        found = matching(layers, entry)
        if not found and entry not in OPTIONAL:
            raise UserError(f"quantization.keep: {entry!r} matches no layer of this model.\n{vocabulary(layers)}")
        for layer in found:
            reasons.setdefault(layer.name, entry)
    quantized = [layer for layer in layers if layer.name not in reasons]
    if not quantized:
        raise UserError(
            f"quantization.keep: {list(keep)} keeps all {len(layers)} layers of this model, so nothing is left to "
            f"quantize. Keep fewer, or use `quantization=none`.\n{vocabulary(layers)}"
        )
    _require_called(model, quantized)
    return Selection(quantized, [Kept(layer, reasons[layer.name]) for layer in layers if layer.name in reasons])


def _require_called(model: nn.Module, quantized: Sequence[Layer]) -> None:
    """timm's EVA and BEiT attention multiplies ``self.qkv.weight`` itself where q and v have biases of their own."""
    for layer in quantized:
        parent = model.get_submodule(layer.name.rpartition(".")[0])
        if getattr(parent, "q_bias", None) is not None and not hasattr(parent, "backend"):
            raise UserError(
                f"{layer.name} cannot be quantized: {type(parent).__name__} reads its weight without calling it. "
                "Swap the attention first (vit_efficient.attention.swap.swap_attention)."
            )


def vocabulary(layers: Sequence[Layer]) -> str:
    """What `keep` can name in a model, short: roles with their counts, and names with block numbers folded."""
    roles = Counter(layer.role for layer in layers)
    folded: dict[str, list[int]] = {}
    for layer in layers:
        folded.setdefault(re.sub(r"\bblocks\.\d+\.", "blocks.*.", layer.name), []).append(layer.block or 0)
    names = [
        name.replace("blocks.*.", f"blocks.{{{min(blocks)}..{max(blocks)}}}.") if len(blocks) > 1 else name
        for name, blocks in folded.items()
    ]
    shown = names[:24] + ([f"... {len(names) - 24} more"] if len(names) > 24 else [])
    return (
        f"  roles   {', '.join(f'{role} ({count})' for role, count in roles.items())}, first_block, last_block\n"
        f"  layers  {', '.join(shown)}"
    )
