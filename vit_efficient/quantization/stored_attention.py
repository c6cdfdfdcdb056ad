"""Attention on codes in a model file: how it is described, and built again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.quantization.fp8_attention import Fp8Attend
from vit_efficient.quantization.int8_attention import Int8Attend, attention_modules, code_attention, usable
from vit_efficient.quantization.stored import StoredAttention, StoredFp8Attention


def describe_attention(model: nn.Module) -> dict[str, StoredAttention | StoredFp8Attention]:
    """How the attention on codes of a model is stored, by the name of the attention module.

    Raises:
        UserError: a static one was not calibrated.
    """
    found = code_attention(model)
    bare = [name for name, attend in found.items() if not all(usable(scale) for scale in attend.buffers())]
    if bare:
        raise UserError(
            f"quantization.attention=static: {bare[0]} (of {len(bare)} such) has no scales. Calibrate the model first "
            "(python -m vit_efficient.quantize), or use quantization.attention=dynamic."
        )
    return {name: _describe(attend) for name, attend in found.items()}


def prepare_attention(
    model: nn.Module, stored: Mapping[str, StoredAttention | StoredFp8Attention], tensors: Mapping[str, Tensor]
) -> None:
    """Give a freshly built model, its attention swapped, the empty backends that a file describes, in place.

    Args:
        model: to load the file's tensors into afterwards.
        stored: from `describe_attention`.
        tensors: of the file, by their names in the model.

    Raises:
        CheckpointError: the model has no such attention, or a scale in the file is absent or cannot be one.
    """
    found = attention_modules(model)
    if strangers := sorted(stored.keys() - found.keys()):
        raise CheckpointError(f"The file is of another model: this one has no attention {', '.join(strangers[:6])}.")
    for name, one in stored.items():
        prefix = f"{name}.backend."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if problem := one.check(own):
            raise CheckpointError(f"The attention on codes of {name} is not what the file says of it: {problem}.")
        device = next(model.parameters()).device
        found[name].backend = _build(one).to(device).train(found[name].training)


def _describe(attend: Int8Attend | Fp8Attend) -> StoredAttention | StoredFp8Attention:
    if isinstance(attend, Fp8Attend):
        return StoredFp8Attention(mode="fp8", values=attend.values)
    return StoredAttention(
        mode=attend.mode, granularity=attend.granularity, values=attend.values, keys=attend.keys
    )  # fmt: skip


def _build(one: StoredAttention | StoredFp8Attention) -> nn.Module:
    if isinstance(one, StoredFp8Attention):
        return Fp8Attend(one.values)
    return Int8Attend(one.mode, one.granularity, one.values, one.keys)
