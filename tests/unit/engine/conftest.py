"""Small deployed integer models, under every scheme of the integer layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.kernels.int8_linear.scheme import Scheme
from vit_efficient.quantization import int8_layers
from vit_efficient.quantization.select import select

SCHEMES = {
    "W8A8 token": Scheme(),
    "W8A8 tensor": Scheme(weights="tensor", activations="tensor"),
    "W8A8 static": Scheme(activations="static"),
    "W4A8 groups": Scheme(weight_bits=4, group=20),  # the last group of 48 inputs is shorter
    "W4A4": Scheme(weight_bits=4, activation_bits=4),
    "W4": Scheme(weight_bits=4, group=20, activations="none"),
}


@pytest.fixture(scope="session")
def integer_model() -> Callable[..., nn.Module]:
    """Makes a deployed model by the name of its scheme, or of `all`, one after the other, in its layers.

    Weights are random, and the same every time.
    """

    def make(scheme: str = "W8A8 token", *, depth: int = 1, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, embed_dim=48, num_heads=3, num_classes=10
        )
        for parameter in model.parameters():  # biases and norms of a fresh model would hide what is done to them
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        swap_attention(model, SdpaConfig().build())
        layers, schemes = select(model, ("head",)).quantized, list(SCHEMES.values())
        own = {
            layer.name: schemes[number % len(schemes)] if scheme == "all" else SCHEMES[scheme]
            for number, layer in enumerate(layers)
        }
        int8_layers.quantize(model, layers, lambda layer: own[layer.name])
        for layer in model.modules():
            if getattr(layer, "input_scale", None) is None:
                continue
            layer.input_scale.fill_(0.02)
            if isinstance(layer, int8_layers.Int8Linear):
                layer.smooth = 0.5 + torch.rand(layer.in_features)
                layer.shift = 0.1 * torch.randn(layer.in_features)
        int8_layers.finalize(model)
        return model.eval()

    return make
