"""What pretrained weights and data must have in common before a model is judged without training."""

from __future__ import annotations

from typing import Any

from vit_efficient.data.datamodule import ViTDataModule
from vit_efficient.errors import UserError
from vit_efficient.model.adapt import FreshHead
from vit_efficient.recipe.schema import Recipe


def labelled(recipe: Recipe, data: ViTDataModule) -> bool:
    """Whether the labels of the data are the model's classes, so that an accuracy means something.

    They are not where the data has other classes than the model, or a single one, which is how images without labels
    are given: a folder of them.
    """
    return recipe.model.num_classes in (None, data.num_classes) and data.num_classes > 1


def require_labels(classes: int | None, data: ViTDataModule) -> None:
    """Refuse to count an accuracy where labels do not mean the model's classes.

    Args:
        classes: outputs of the model's head; None: as many as the data has.
        data: what it would be counted on.

    Raises:
        UserError: the data has one class, or other classes than the model.
    """
    how = (
        "Give evaluation shards with the model's classes (data.eval_shards). How far a quantized model is from full "
        "precision needs no labels: `python -m vit_efficient.quantize` measures it."
    )
    if data.num_classes < 2:
        raise UserError(f"The data has a single class, so every answer would count as right. {how}")
    if classes is not None and classes != data.num_classes:
        raise UserError(
            f"The model has {classes:,} classes and the data {data.num_classes:,}, so a label does not mean the same "
            f"to both and no accuracy can be counted. {how}"
        )


def require_trained_head(fresh: FreshHead | None, recipe: Recipe) -> None:
    """Refuse pretrained weights whose classifier would be random.

    Args:
        fresh: of the model that was built from them.
        recipe: resolved.

    Raises:
        UserError: the weights have no classifier, or one for other classes.
    """
    if fresh is None:
        return
    quantization: Any = recipe.quantization
    weights = getattr(quantization, "base", None) or recipe.model.weights
    if fresh.loaded is None:
        raise UserError(
            f"The weights {weights} have no classifier, and a random one says nothing of them. Give weights with a "
            "head, or train one: `python -m vit_efficient.fit`."
        )
    wanted = (
        f"the data {fresh.classes:,}" if recipe.model.num_classes is None else f"model.num_classes is {fresh.classes}"
    )
    raise UserError(
        f"The weights {weights} have {fresh.loaded:,} classes, {wanted}: the head would be a random one. "
        f"Set model.num_classes={fresh.loaded}."
    )
