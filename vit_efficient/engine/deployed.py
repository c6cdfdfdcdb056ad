"""The file that a run ships: one self-describing safetensors file, written, loaded afresh, and evaluated as loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vit_efficient.attention.config import AttentionConfig
from vit_efficient.data.image import ImageSpec
from vit_efficient.engine.checkpoint import atomic_write
from vit_efficient.errors import CheckpointError
from vit_efficient.model.build import build_plain, compute_dtype
from vit_efficient.quantization.deploy import FORMAT, VERSION, check_layers, deployed_state, digest, load_deployed
from vit_efficient.recipe.schema import Recipe


@dataclass
class Deployed:
    """A model as it ships, what it was made by, and what its outputs mean."""

    model: nn.Module
    image: ImageSpec
    recipe: Recipe
    class_names: list[str]
    parameters: int
    merged: dict[str, str] | None = None
    """Where it was merged from, if it was: see `engine.merging`."""
    source: dict[str, str] | None = None
    """The weights that it was quantized from without training, if it was: see `engine.quantizing`."""


def save_deployed(
    path: Path,
    model: nn.Module,
    recipe: Recipe,
    class_names: list[str],
    *,
    merged: dict[str, str] | None = None,
    source: dict[str, str] | None = None,
) -> int:
    """Write the deployed form of ``model`` (integer codes and scales, packed 4 bits, or floats) and its description.

    Args:
        merged: where it was merged from, if it was.
        source: the weights that it was quantized from, if it was not trained.

    Returns:
        The file's size in bytes.
    """
    tensors, scheme = deployed_state(model, compute_dtype(recipe))
    description = {
        "recipe": recipe.model_dump_json(),
        "class_names": json.dumps(class_names),
        **({"merged": json.dumps(merged)} if merged is not None else {}),
        **({"source": json.dumps(source)} if source is not None else {}),
        **scheme,
    }
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_layers(own, scheme)
    description["digest"] = digest(own, description)
    atomic_write(path, lambda temporary: save_file(own, temporary, metadata=description))
    return path.stat().st_size


def load_file(path: Path, *, attention: AttentionConfig | None = None) -> Deployed:
    """Build the model that a deployed file describes, on the CPU, in evaluation mode.

    Args:
        attention: another backend than the one that it was trained with.

    Raises:
        CheckpointError: missing, damaged, or not such a file.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no model file at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            description = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Cannot read the model file {path}: {error}. It is damaged or not safetensors."
        ) from error
    if description.get("format") != FORMAT or "recipe" not in description:
        raise CheckpointError(
            f"{path} is not a model that this package deployed (format {description.get('format')!r}, not {FORMAT!r}). "
            "Plain weights are given as `model.weights=`."
        )
    if description.get("version") == VERSION and digest(tensors, description) != description.pop("digest", None):
        raise CheckpointError(f"{path} was altered: its content does not have the digest that it was written with.")
    try:
        recipe = Recipe.model_validate_json(description.pop("recipe"))
    except ValidationError as error:
        raise CheckpointError(f"{path} holds a recipe of another version of this program: {error}") from error
    class_names = json.loads(description.pop("class_names"))
    merged = json.loads(description.pop("merged", "null"))
    source = json.loads(description.pop("source", "null"))
    if attention is not None:
        recipe = recipe.model_copy(update={"attention": attention})
    # Nothing is dropped in evaluation, and a mask has no hooks, which `torch.export` in strict mode cannot trace.
    config = recipe.model.model_copy(update={"weights": None, "stochastic_depth": "mask"})
    model, image, _ = build_plain(config, recipe, len(class_names))
    parameters = sum(p.numel() for p in model.parameters())
    load_deployed(model, tensors, description)
    return Deployed(model.eval(), image, recipe, class_names, parameters, merged, source)
