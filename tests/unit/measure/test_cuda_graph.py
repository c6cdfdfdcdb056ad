"""A captured model answers as the model does, and is refused where it cannot be."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient import quantize_model
from vit_efficient.errors import CapabilityError, UserError
from vit_efficient.measure.cuda_graph import GraphedModel


def small() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1, num_classes=7
    ).eval()


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(CapabilityError, match="needs a CUDA device, and the images are on cpu"):
        GraphedModel(small(), torch.randn(1, 3, 32, 32))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, "int8_sdpa", "fp8_sdpa", "w4a8_sdpa"])
def test_replayed_on_other_images(recipe: str | None) -> None:
    model = small().to("cuda", torch.bfloat16)
    if recipe is not None:
        model = quantize_model(model, recipe)
    images = torch.randn(3, 1, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    graphed = GraphedModel(model, images[0])
    with torch.inference_mode():
        first, second = (graphed(one) for one in images[1:])
        assert not first.equal(second)
        torch.testing.assert_close(first, model(images[1]))
        torch.testing.assert_close(second, model(images[2]))
    with pytest.raises(UserError, match="captured for images"):
        graphed(torch.randn(2, 3, 32, 32, device="cuda"))


@pytest.mark.gpu
def test_what_cannot_be_captured_is_refused() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum())

    with pytest.raises(CapabilityError, match="Waits cannot be captured as a CUDA graph"):
        GraphedModel(Waits().eval(), torch.randn(1, 3, 8, 8, device="cuda"))
    assert torch.randn(4, device="cuda").isfinite().all()  # a failed capture leaves the generator usable
    with pytest.raises(UserError, match="in training mode"):
        GraphedModel(small().cuda().train(), torch.randn(1, 3, 32, 32, device="cuda"))
