"""A Vision Transformer of timm, with the weights, image size and class count that a recipe asks for."""

from __future__ import annotations

import difflib
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from vit_efficient.data.image import ImageSpec
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.model.adapt import FreshHead, adapt
from vit_efficient.model.hub import pretrained_name
from vit_efficient.model.narrow import Undrawn, narrow_linears
from vit_efficient.model.weights import Weights, not_finite, read_weights
from vit_efficient.recipe.schema import ModelConfig

# What timm.create_model takes and a recipe says elsewhere, or must not say because it loads files or changes the kind
# of model.
RESERVED = {
    "num_classes": "`model.num_classes`",
    "img_size": "`model.image_size`",
    "pretrained": "`model.weights: timm`",
    "checkpoint_path": "`model.weights`",
    "pretrained_cfg": "`model.weights: timm:TAG`",
    "pretrained_cfg_overlay": "`model.weights`",
    "features_only": "",
    "in_chans": "",
}


@dataclass
class Backbone:
    """A model, what it expects of images, and what a person should know of how it came about.

    Args:
        model: a timm model that maps (B, 3, S, S) to (B, classes).
        image: its input.
        notes: what was resized, re-initialised or left at random.
        weights_digest: sha256 of the weight file; None for random initial weights.
        changes: those of the notes that say how the weights had to be changed to fit.
        weights_source: the weight file's path, or its name on the hub; None for random initial weights.
        fresh_head: the classifier that the weights have not or have for other classes; None where they filled it, and
            for random initial weights.
    """

    model: nn.Module
    image: ImageSpec
    notes: list[str] = field(default_factory=list)
    weights_digest: str | None = None
    changes: list[str] = field(default_factory=list)
    weights_source: str | None = None
    fresh_head: FreshHead | None = None


def create_backbone(config: ModelConfig, num_classes: int | None = None) -> Backbone:
    """Create the model on the CPU, in float32 (its linear weights in ``config.storage``), and load its weights.

    The class count is ``config.num_classes``, else `num_classes`, else that of the weights' head, else timm's default.

    Raises:
        UserError: no such model, not a Vision Transformer, arguments that timm refuses.
        CheckpointError: weights that cannot be read, do not fit, or hold a NaN or an infinity.
    """
    name = _known_name(config.name)
    _check_kwargs(config)
    weights = read_weights(config.weights, name) if config.weights else None
    tag = config.weights.partition(":")[2] if config.weights and config.weights.startswith("timm:") else ""
    classes = config.num_classes or num_classes or _classes(weights)
    model = _create(config, pretrained_name(name, tag), classes, given=weights is not None)
    image = _image_spec(model, config)
    if weights is None:
        return Backbone(model, image, ["no weights given: initialised at random"])
    changes, fresh = adapt(model, weights.state, weights.source)
    if (broken := not_finite(weights.state)) is not None:
        raise CheckpointError(
            f"{weights.source}: the weight {broken} holds a NaN or an infinity. Check `model.weights`: such a model "
            "answers nothing."
        )
    notes = [f"weights from {weights.source}", *changes]
    return Backbone(model, image, notes, weights.digest, changes, weights.source, fresh)


def _known_name(name: str) -> str:
    names = timm.list_models()
    base = name.partition(".")[0]
    if base in names:
        return name
    near = difflib.get_close_matches(base, names, n=3, cutoff=0.6)
    hint = f"Did you mean {', '.join(near)}?" if near else "`timm.list_models('vit*')` lists the Vision Transformers."
    raise UserError(f"`model.name`: timm has no model {name!r}. {hint}")


def _check_kwargs(config: ModelConfig) -> None:
    for key in config.kwargs.keys() & RESERVED.keys():
        use = RESERVED[key]
        raise UserError(f"`model.kwargs.{key}` cannot be set" + (f": use {use}." if use else "."))
    rate = config.kwargs.get("drop_path_rate", 0.0)
    if not (isinstance(rate, int | float) and 0 <= rate < 1):  # timm takes a negative one for none
        raise UserError(
            f"model.kwargs.drop_path_rate is {rate!r}. It is the share of samples that leave out the last block in "
            "training: from 0 to less than 1, 0.2 for example."
        )


def _classes(weights: Weights | None) -> int | None:
    head = weights.state.get("head.weight") if weights is not None else None
    return head.shape[0] if head is not None else None


def _create(config: ModelConfig, name: str, num_classes: int | None, *, given: bool) -> nn.Module:
    """`given`: whether weights take the place of the initial ones."""
    narrow = config.storage == "bfloat16"
    arguments: dict[str, Any] = dict(config.kwargs)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if config.image_size is not None:
        arguments["img_size"] = config.image_size
    try:
        with narrow_linears(torch.bfloat16 if narrow else None), Undrawn() if narrow and given else nullcontext():
            model = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError, KeyError, ZeroDivisionError) as error:
        asked = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(
            f"timm cannot make {config.name} with {asked}: {error or type(error).__name__}. "
            "Check `model.kwargs` and `model.image_size`."
        ) from error
    if not (isinstance(getattr(model, "blocks", None), nn.Module) and hasattr(model, "patch_embed")):
        raise UserError(
            f"`model.name`: {config.name} is a {type(model).__name__}, not a Vision Transformer (it has no patch "
            "embedding with blocks behind it). Take a model of the families vit_*, deit_*, deit3_*, beit_* or eva02_*."
        )
    return model


def _image_spec(model: nn.Module, config: ModelConfig) -> ImageSpec:
    """What the model's own timm config says, at the size that it was made for."""
    data = resolve_model_data_config(model)
    embed: Any = model.patch_embed
    own = getattr(embed, "img_size", None) or data["input_size"][1:]
    height, width = (config.image_size, config.image_size) if config.image_size else (int(own[0]), int(own[1]))
    if height != width:
        raise UserError(f"{config.name} takes images of {height} x {width} pixels: set `model.image_size` (square).")
    patch = int(getattr(embed, "patch_size", (1, 1))[0])
    if height % patch:
        below = height // patch * patch
        sizes = f"{below} or {below + patch}" if below else f"{patch}"
        raise UserError(
            f"`model.image_size` is {height}, which is not a multiple of {config.name}'s patches of {patch} pixels. "
            f"Take {sizes}."
        )
    return ImageSpec(height, tuple(data["mean"]), tuple(data["std"]), data["interpolation"], data["crop_pct"])
