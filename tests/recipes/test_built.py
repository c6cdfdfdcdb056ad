"""Every shipped recipe is built into a model, without its data and without its pretrained weights."""

from __future__ import annotations

import pytest
import torch

from vit_efficient.machine import Machine, installed
from vit_efficient.model.build import build_model
from vit_efficient.recipe import files
from vit_efficient.recipe.compat import resolve
from vit_efficient.recipe.load import load_recipe

CLASSES = {
    "digits": 10, "cifar10": 10, "cifar10_vit_ti": 10, "folder": 3, "tiny_imagenet": 200, "imagenet_vit_l16": 1000,
}  # fmt: skip
TOKENS = {
    "digits": 16, "cifar10": 64, "cifar10_vit_ti": 196, "folder": 196, "tiny_imagenet": 64, "imagenet_vit_l16": 196,
}  # fmt: skip


DEPLOYED_ONLY = ("int4_group_sdpa",)


@pytest.mark.parametrize("protocol", sorted(CLASSES))
@pytest.mark.parametrize("variant", files.names("variant"))
def test_build(variant: str, protocol: str) -> None:
    words = [f"protocol={protocol}", "model.weights=null"]
    if protocol == "imagenet_vit_l16":
        words.append("model.kwargs.depth=2")  # two of its 24 blocks tell as much, for a twelfth of the memory
    recipe, _ = resolve(load_recipe(variant, words).recipe, Machine(cores=2, packages=installed()))
    built = build_model(recipe, CLASSES[protocol])
    assert built.image.size == recipe.model.image_size
    assert built.model.pos_embed.shape[1] == TOKENS[protocol] + 1  # and the class token
    assert built.trainable <= built.parameters
    assert bool(built.trainable) == (variant not in DEPLOYED_ONLY)
    assert (built.report.quantized_parameters > 0) == (recipe.quantization.name != "none")
    if recipe.attention.name == "sdpa":
        with torch.inference_mode():
            size = built.image.size
            assert built.model.eval()(torch.randn(1, 3, size, size)).shape == (1, CLASSES[protocol])
