"""The patch embedding as a product."""

from __future__ import annotations

import pytest
import timm
import torch

from vit_efficient.model.patches import PatchConv2d, patches_as_product


@pytest.mark.parametrize(("kernel", "size"), [((16, 16), (64, 48)), ((4, 8), (12, 24)), ((1, 1), (3, 5))])
@pytest.mark.parametrize("bias", [True, False])
def test_product_is_the_convolution(kernel: tuple[int, int], size: tuple[int, int], bias: bool) -> None:
    conv = PatchConv2d(3, 10, kernel, kernel, bias=bias)
    for x in (torch.randn(2, 3, *size), torch.randn(2, 3, *size).to(memory_format=torch.channels_last)):
        y, expected = conv.product(x), torch.nn.Conv2d.forward(conv, x)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert y.flatten(2).transpose(1, 2).is_contiguous()  # what the tokens are made of: no copy


def test_gradients() -> None:
    conv, x = PatchConv2d(3, 8, 4, 4), torch.randn(2, 3, 8, 12)
    weight = torch.randn(2, 8, 2, 3)
    grads = [torch.autograd.grad((f(x) * weight).sum(), (conv.weight, conv.bias)) for f in (conv.product, conv.forward)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_in_a_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    x, before = torch.randn(2, 3, 32, 32), dict(model.state_dict())
    expected = model(x)
    patches_as_product(model)
    assert type(model.patch_embed.proj) is PatchConv2d
    assert all(before[key] is value or before[key].equal(value) for key, value in model.state_dict().items())
    assert model(x).equal(expected)  # a CPU goes on with the convolution


def test_what_is_no_such_convolution_stays() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    model.patch_embed.proj = other = torch.nn.Conv2d(3, 192, 16, 16, padding=1)
    patches_as_product(model)
    assert model.patch_embed.proj is other


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    conv = PatchConv2d(3, 64, 16, 16).cuda()
    for size in (224, 230):  # the convolution leaves a rest out
        x = torch.randn(4, 3, size, size, device="cuda")
        with torch.backends.cudnn.flags(allow_tf32=False):
            torch.testing.assert_close(conv(x), torch.nn.Conv2d.forward(conv, x), rtol=1e-4, atol=1e-4)
