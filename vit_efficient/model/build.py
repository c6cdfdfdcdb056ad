"""The one ordered list that makes a model from a recipe: load, swap attention, quantize, add adapters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vit_efficient.attention.padding import pad_tokens
from vit_efficient.attention.swap import swap_attention
from vit_efficient.data.image import ImageSpec
from vit_efficient.errors import UserError
from vit_efficient.model import stochastic_depth
from vit_efficient.model.adapt import FreshHead
from vit_efficient.model.backbone import Backbone, create_backbone
from vit_efficient.model.gelu import shorten_gelu
from vit_efficient.model.late_bias import late_biases
from vit_efficient.model.narrow import widen
from vit_efficient.model.origin import Origin
from vit_efficient.model.patches import patches_as_product
from vit_efficient.model.weights import is_quantized
from vit_efficient.parallel.order import prepare_blocks
from vit_efficient.quantization.base import Report
from vit_efficient.recipe.schema import ModelConfig, Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Built:
    """A model as a recipe wants it, and what a person should know of how it came about."""

    model: nn.Module
    image: ImageSpec
    report: Report
    notes: list[str]
    parameters: int
    """Weights of the float model, before quantization and adapters."""
    origin: Origin | None = None
    """The weight file that it began from; None: random initial weights."""
    fresh_head: FreshHead | None = None
    """The classifier that was left at random though weights were given."""

    @property
    def trainable(self) -> int:
        """Weights that are trained now."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        assert isinstance(self.model.blocks, nn.ModuleList | nn.Sequential)
        return self.model.blocks  # type: ignore[return-value]


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype of what is not quantized. The recipe must be resolved: `auto` is not a dtype."""
    return DTYPES[recipe.quantization.precision]


def build_plain(config: ModelConfig, recipe: Recipe, num_classes: int) -> tuple[nn.Module, ImageSpec, list[str]]:
    """The float model with the recipe's attention: steps one and two of the list."""
    backbone = build_backbone(config, recipe, num_classes)
    return backbone.model, backbone.image, list(backbone.notes)


def build_backbone(config: ModelConfig, recipe: Recipe, num_classes: int) -> Backbone:
    """`build_plain` with all that is known of the weights."""
    backbone = create_backbone(config, num_classes)
    for_speed(backbone.model, config.stochastic_depth)
    swap_attention(backbone.model, recipe.attention.build())
    if config.pad_tokens:
        pad_tokens(backbone.model, config.pad_tokens)
    return backbone


def for_speed(model: nn.Module, depth: str = "mask") -> None:
    """Put modules that compute the same faster in place of timm's, in place; parameters and their names stay.

    Args:
        model: of timm.
        depth: how its blocks are dropped in training, `stochastic_depth.install`.
    """
    patches_as_product(model)
    stochastic_depth.install(model, depth)
    shorten_gelu(model)


def refuse_rounded(recipe: Recipe, weights: str | None) -> None:
    """Refuse a quantized model file where its weights would be taken for full precision.

    Raises:
        UserError: it is one.
        CheckpointError: there is no such file.
    """
    if recipe.quantization.name != "int8" and is_quantized(weights):
        raise UserError(
            f"{weights} is a quantized model file, and quantization={recipe.quantization.name} would take its "
            "rounded weights for full precision. Give the float weights that it was made of; quantization=int8 can "
            "go on training from such a file."
        )


def build_model(recipe: Recipe, num_classes: int, *, base: str | None = None) -> Built:
    """Build the model that a recipe trains or evaluates.

    Weights are loaded before quantization and attention is swapped under the same parameter names, so any timm
    checkpoint fits before and after.

    Args:
        recipe: resolved (no `auto` precision).
        num_classes: outputs of the head.
        base: weights that adapters start from, in place of ``model.weights``.

    Raises:
        UserError: unknown model, weights that do not fit, nothing to quantize, a backend that refuses.
    """
    config = recipe.model.model_copy(update={"weights": base}) if base else recipe.model
    refuse_rounded(recipe, config.weights)
    if config.storage != "float32" and getattr(recipe.quantization, "lora", None) is None:
        raise UserError(
            f"model.storage: {config.storage} rounds the weights, which is for a frozen base, and this recipe trains "
            "them. Take quantization=int4 or quantization.lora, or model.storage=float32."
        )
    backbone = build_backbone(config, recipe, num_classes)
    model = backbone.model
    parameters = sum(p.numel() for p in model.parameters())
    report = recipe.quantization.apply(model, compute_dtype=compute_dtype(recipe))
    if config.storage != "float32":
        widen(model)
    origin = None
    if backbone.weights_digest is not None:
        assert backbone.weights_source is not None, "a hash is of something"
        origin = Origin(backbone.weights_source, backbone.weights_digest)
    return Built(model, backbone.image, report, list(backbone.notes), parameters, origin, backbone.fresh_head)


def prepare_training(built: Built, recipe: Recipe) -> None:
    """Prepare a model's blocks for training steps, in place, before a strategy cuts it up.

    Args:
        built: of `build_model`.
        recipe: resolved; its strategy says whether blocks are compiled and recomputed.
    """
    if recipe.strategy.compile and may_be_late(recipe):
        late_biases(built.model)
    prepare_blocks(built.blocks, checkpointing=recipe.strategy.checkpointing, compile=recipe.strategy.compile)


def may_be_late(recipe: Recipe) -> bool:
    """Whether a model has `late_biases` if its blocks are compiled. ZeRO 3 gathers parameters layer by layer."""
    return recipe.plain and recipe.strategy.name != "deepspeed"
