"""Padded sequences: the model answers and learns as without padding, whatever the padding holds."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.attention.padding import TokenPadding, pad_tokens, unpadded
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import UserError

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},  # class token
    "vit_base_patch16_siglip_224": {},  # none; the pooling attends over all tokens
    "vit_small_patch14_reg4_dinov2": {"init_values": 0.3},  # registers
    "vit_small_patch16_dinov3": {"init_values": 0.3},  # rotary
    "eva02_base_patch14_224": {"mlp_ratio": 2.0},  # rotary, split
    "beit_base_patch16_224": {"init_values": 0.3},  # a position bias a block
    "vit_relpos_small_patch16_224": {"init_values": 0.3},  # mean pooling
}
SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


def plain(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **FAMILIES.get(name, {}), **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    swap_attention(model, SdpaConfig().build())
    return model


def images() -> Tensor:
    return torch.randn(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of each parameter."""
    model.zero_grad()
    logits = model(images())
    logits.square().sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_without_padding(name: str, multiple: int) -> None:
    model = plain(name)
    wanted, gradients = run(model)
    names = list(model.state_dict())
    pad_tokens(model, multiple)
    lengths: list[int] = []
    model.blocks[1].register_forward_pre_hook(lambda block, x: lengths.append(x[0].shape[1]))
    found, padded = run(model)
    real = model.blocks[0].attn.padding.real
    assert lengths == [-(-real // multiple) * multiple]
    assert lengths[0] > real
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert padded.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (padded[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("poison", [1e4, float("nan")])
def test_nothing_reads_the_padding(name: str, poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain(name)
    wanted = model(images())
    append = TokenPadding.append

    def poisoned(self: TokenPadding, block: nn.Module, inputs: Any) -> Any:
        x, *rest = append(self, block, inputs)
        assert self.real is not None
        x[:, self.real :] = poison
        return x, *rest

    monkeypatch.setattr(TokenPadding, "append", poisoned)
    pad_tokens(model, 32)
    torch.testing.assert_close(model(images()), wanted, rtol=1e-4, atol=1e-5)


def test_the_padding_is_off_where_it_must_not_be_seen() -> None:
    model = plain()
    pad_tokens(model, 8)
    lengths: list[int] = []
    model.blocks[1].register_forward_pre_hook(lambda block, x: lengths.append(x[0].shape[1]))
    with unpadded(model):
        model(images())
    model(images())
    assert lengths == [26, 32]


def test_a_masked_backend_is_not_needed() -> None:
    """The backend is given fewer keys and no mask, so one that takes no mask will do."""
    seen: list[tuple[Any, ...]] = []

    class Backend(type(SdpaConfig().build())):  # type: ignore[misc]
        takes_bias = False

        def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            seen.append((q.shape[2], k.shape[2], v.shape[2], options["mask"], options["bias"]))
            return super().attend(q, k, v, **options)

    model = plain()
    swap_attention(model, Backend())
    pad_tokens(model, 8)
    model(images())
    assert seen == [(32, 26, 26, None, None)] * 2


def test_exported() -> None:
    model = plain("vit_small_patch16_dinov3")
    pad_tokens(model, 8)
    with torch.no_grad():
        exported = torch.export.export(model, (images(),))
        torch.testing.assert_close(exported.module()(images()), model(images()))


def test_attention_that_cannot_leave_keys_out() -> None:
    with pytest.raises(UserError, match=r"`model.pad_tokens=8` cannot be: `attn` is a DiffAttention"):
        pad_tokens(plain(attn_layer="diff", num_heads=2), 8)
    with pytest.raises(UserError, match="needs an attention that was swapped"):
        pad_tokens(timm.create_model("vit_tiny_patch16_224", **SMALL), 8)
