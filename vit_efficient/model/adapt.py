"""Put weights into a model that may want another image size, patch size or class count than they were made for."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_efficient.errors import CheckpointError

SHOWN = 10


@dataclass(frozen=True)
class FreshHead:
    """A classifier that the weights did not fill, so that its answers are random.

    Args:
        classes: what the model was asked for.
        loaded: what the weights have; None: no classifier at all.
    """

    classes: int
    loaded: int | None


def adapt(model: nn.Module, state: dict[str, Tensor], source: str) -> tuple[list[str], FreshHead | None]:
    """Load `state` into a timm model and say what had to be changed for it to fit.

    Position embeddings, patch embeddings and relative position tables are resized by timm's own filter for the model's
    family. A head of another class count keeps its initial weights. Everything else must fit exactly.

    Args:
        model: fresh from timm; its attention may have been swapped.
        state: tensors by name.
        source: what to call them in messages.

    Returns:
        Sentences for a person to read, and the first classifier that keeps its initial weights, if one does.

    Raises:
        CheckpointError: names that are missing, not known, or of another shape; the first ten of each.
    """
    fitted = _filter(model, state, source)
    notes = _resized(state, fitted, model)
    names, head, said = _leave_out_heads(model, fitted)
    _check(model, fitted, names, source)
    model.load_state_dict(fitted, strict=False)  # strict but for the fresh heads, as just checked
    return notes + said, head


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifiers: one, or two in distilled DeiT."""
    names: Any = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def _filter(model: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    convert = _filter_function(model)
    if convert is None:
        return dict(state)
    # Original DeiT-III files name their layer scales otherwise than timm does.
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(convert).parameters else {}
    try:
        return dict(convert(dict(state), model, **options))
    except (RuntimeError, AssertionError, KeyError, IndexError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: timm's conversion of its weights failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def _filter_function(model: nn.Module) -> Callable[..., dict[str, Tensor]] | None:
    """timm's converter of foreign and differently sized checkpoints, which lies beside the model's class."""
    for cls in type(model).__mro__:
        if function := getattr(sys.modules[cls.__module__], "checkpoint_filter_fn", None):
            return function
    return None


def _resized(before: dict[str, Tensor], after: dict[str, Tensor], model: nn.Module) -> list[str]:
    """What the filter changed the shape of, in words."""
    prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
    notes, tables = [], 0
    for name, new in after.items():
        old = before.get(name)
        if old is None or old.shape == new.shape:
            continue
        if name.endswith("pos_embed"):
            notes.append(f"position embeddings resized {_grid(old, prefix)} -> {_grid(new, prefix)}")
        elif name.endswith("patch_embed.proj.weight"):
            notes.append(f"patch embedding resized {_pixels(old)} -> {_pixels(new)} pixels")
        elif name.endswith("relative_position_bias_table"):
            tables += 1
        else:
            notes.append(f"{name} reshaped {tuple(old.shape)} -> {tuple(new.shape)}")
    if tables:
        notes.append(f"relative position biases resized in {tables} {'block' if tables == 1 else 'blocks'}")
    return notes


def _leave_out_heads(model: nn.Module, state: dict[str, Tensor]) -> tuple[set[str], FreshHead | None, list[str]]:
    """Take heads of another class count out of `state`.

    Returns:
        The names that then keep their initial weights, the first such head, and notes.
    """
    parameters = dict(model.named_parameters())
    fresh: set[str] = set()
    first: FreshHead | None = None
    notes = []
    for head in head_names(model):
        own, loaded = parameters.get(f"{head}.weight"), state.get(f"{head}.weight")
        if own is None or (loaded is not None and loaded.shape[0] == own.shape[0]):
            continue
        first = first or FreshHead(own.shape[0], None if loaded is None else loaded.shape[0])
        if loaded is None:
            notes.append(f"the weights have no `{head}`: initialised for {own.shape[0]} classes")
        else:
            notes.append(f"`{head}` re-initialised: {loaded.shape[0]} -> {own.shape[0]} classes")
        for name in (f"{head}.weight", f"{head}.bias"):
            state.pop(name, None)
            fresh.add(name)
    return fresh, first, notes


def _check(model: nn.Module, state: dict[str, Tensor], fresh: set[str], source: str) -> None:
    own = model.state_dict()
    missing = [name for name in own if name not in state and name not in fresh]
    unknown = [name for name in state if name not in own]
    misfits = [
        f"{name} ({_kind(tensor)}, wanted {_kind(own[name])})"
        for name, tensor in state.items()
        if name in own
        and (tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point())
    ]
    if not (missing or unknown or misfits):
        return
    lines = [f"{source} does not fit the model {_name(model)}."]
    lines += [_listed("missing", missing), _listed("not in the model", unknown), _listed("of another shape", misfits)]
    if any(".lora_A" in name or ".base_layer" in name for name in state):
        lines.append(
            "  It holds low-rank adapters: evaluate its run with `--checkpoint`, or give the base it began from."
        )
    elif any(tensor.dtype in (torch.int8, torch.uint8) for tensor in state.values()):
        lines.append(
            "  It holds the codes of a quantized model: evaluate its run with `--checkpoint`, or give one of the "
            "float checkpoints in its `checkpoints` folder."
        )
    else:
        lines.append("  Check `model.name` and `model.kwargs` against what the weights were made for.")
    raise CheckpointError("\n".join(line for line in lines if line))


def _listed(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    rest = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"  {what} ({len(names)}): {', '.join(names[:SHOWN])}{rest}"


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape)) or 'scalar'}"


def _grid(pos_embed: Tensor, prefix: int) -> str:
    """Positions of (1, N, D) as ``14x14``, or as a count where they are no square."""
    patches = pos_embed.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    return f"{side}x{side}" if side * side == patches else f"{patches} positions"


def _pixels(weight: Tensor) -> str:
    return "x".join(map(str, weight.shape[-2:]))
