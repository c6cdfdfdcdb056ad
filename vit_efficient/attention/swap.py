"""Let the attention modules of a timm model attend through a backend; every parameter keeps its name."""

from __future__ import annotations

from timm.layers import Attention, AttentionPoolLatent, AttentionRope, DiffAttention
from timm.layers.attention_pool import AttentionPoolPrr
from timm.models import beit, eva, vision_transformer_relpos
from torch import nn

from vit_efficient.attention import differential, modules, pooling
from vit_efficient.attention.base import AttentionBackend
from vit_efficient.attention.modules import BackendAttention
from vit_efficient.errors import CapabilityError, UserError

REPLACEMENTS: dict[type[nn.Module], type[BackendAttention]] = {
    Attention: modules.SelfAttention,
    AttentionRope: modules.SelfAttention,
    eva.EvaAttention: modules.SelfAttention,
    beit.Attention: modules.BeitAttention,
    vision_transformer_relpos.RelPosAttention: modules.RelPosAttention,
    DiffAttention: differential.DiffAttention,
    AttentionPoolLatent: pooling.LatentPool,
    AttentionPoolPrr: pooling.RefiningPool,
}


def swap_attention(model: nn.Module, backend: AttentionBackend) -> int:
    """Make every attention of `model` go through `backend`, in place, and return how many there are.

    Parameters, buffers, their names and their order stay as they were, so checkpoints fit before and after. A model
    that was swapped already takes the new backend.

    Raises:
        UserError: the model has an attention that is not known here, or none at all.
        CapabilityError: the backend cannot add the position bias that this model has.
    """
    found = known_attention(model)
    swapped = {name: _replacement(module, backend) for name, module in found}
    for name, module in swapped.items():
        if module.needs_bias and not backend.takes_bias:
            raise CapabilityError(
                f"`attention: {backend.name}` cannot run: `{name}` ({module.replaces}) adds a relative position bias "
                f"to its logits, and {backend.name} takes none. Take `attention=sdpa`."
            )
    for name, module in swapped.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
        module.backend = backend
    return len(swapped)


def head_widths(model: nn.Module) -> set[int]:
    """The head widths E of a swapped model: one, or two where the pooling has heads of its own."""
    return {module.head_width for module in model.modules() if isinstance(module, BackendAttention)}


def _attends(module: nn.Module) -> bool:
    """Whether a module computes attention, known here or not. timm marks its own by `fused_attn`."""
    name = type(module).__name__.lower()
    return (
        isinstance(module, BackendAttention) or hasattr(module, "fused_attn") or "attn" in name or "attention" in name
    )


def known_attention(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every attention of a model, by name.

    Raises:
        UserError: the model has one that is not known here, or none at all.
    """
    found = [(name, module) for name, module in model.named_modules() if name and _attends(module)]
    for name, module in found:
        if not isinstance(module, BackendAttention) and type(module) not in REPLACEMENTS:
            known = ", ".join(sorted({original.__name__ for original in REPLACEMENTS}))
            raise UserError(
                f"The attention of this model cannot be replaced: `{name}` is a {type(module).__name__} "
                f"({type(module).__module__}), and known are {known}. Take another `model.name`."
            )
    if not found:
        raise UserError(
            f"{type(model).__name__} has no attention, so there is nothing for `attention` to act on. "
            "Take a Vision Transformer of timm."
        )
    return found


def _replacement(module: nn.Module, backend: AttentionBackend) -> BackendAttention:
    return module if isinstance(module, BackendAttention) else REPLACEMENTS[type(module)](module, backend)
