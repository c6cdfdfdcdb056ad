"""The estimate of each token's importance against the Fisher information itself, by the whole Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from vit_efficient.quantization import importance
from vit_efficient.quantization.importance import tempered, token_importance

TOKENS, WIDTH, CLASSES = 5, 6, 4


class Tiny(nn.Module):
    """Tokens that meet in an attention-like product and an average; unequal on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        mixed = (hidden @ hidden.transpose(1, 2)).softmax(dim=-1) @ self.second(hidden)
        weights = torch.linspace(0, 1, TOKENS)  # the first token counts only by what the others take from it
        return 3 * self.head((mixed * weights[:, None]).sum(dim=1))


def exact(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """trace(Jᵀ (diag(p) - p pᵀ) J) of each token of each image, J that of the logits by the token of the layer."""
    found = []
    for image in images:
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda module, arguments, output: outputs.append(output))  # noqa: B023
        logits = model(image[None].requires_grad_())[0]
        handle.remove()
        rows = [torch.autograd.grad(logit, outputs[0], retain_graph=True)[0][0] for logit in logits]
        jacobian = torch.stack(rows).detach()  # (C, T, N)
        if jacobian.dim() == 2:  # the head: one token an image
            jacobian = jacobian.unsqueeze(1)
        p = logits.detach().softmax(dim=0)
        fisher = p.diag() - p.outer(p)
        found.append(torch.einsum("ctn,cd,dtn->t", jacobian, fisher, jacobian))
    return torch.cat(found)


@pytest.fixture
def many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "DRAWS", 3000)


@pytest.mark.usefixtures("many_draws")
@pytest.mark.parametrize("name", ["first", "second", "head"])
def test_is_the_trace_of_the_fisher_information(name: str) -> None:
    torch.manual_seed(0)
    model = Tiny()
    images = torch.randn(2, TOKENS, 3)
    layer = model.get_submodule(name)
    own = token_importance(model, {name: layer}, [images.clone()])[name]
    expected = exact(model, layer, images)
    assert own.shape == expected.shape
    torch.testing.assert_close(own, expected / expected.mean(), rtol=0.12, atol=0.01)
    if name == "first":
        assert own.max() > 2 * own.min()  # there is something to get wrong


def test_batches_do_not_matter_but_for_the_draws(many_draws: None) -> None:
    torch.manual_seed(0)
    model, images = Tiny(), torch.randn(4, TOKENS, 3)
    whole = token_importance(model, {"first": model.first}, [images.clone()])["first"]
    parts = token_importance(model, {"first": model.first}, [images[:1].clone(), images[1:].clone()])["first"]
    torch.testing.assert_close(parts, whole, rtol=0.15, atol=0.02)


def vit(pool: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=10,
        global_pool=pool, **({"class_token": False} if pool == "avg" else {}), **kwargs,
    ).eval()  # fmt: skip


LAYERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "patch_embed.proj": lambda model: model.patch_embed.proj,
    "blocks.0.mlp.fc2": lambda model: model.blocks[0].mlp.fc2,
    "blocks.1.attn.qkv": lambda model: model.blocks[1].attn.qkv,
    "blocks.1.attn.proj": lambda model: model.blocks[1].attn.proj,
    "blocks.1.mlp.fc1": lambda model: model.blocks[1].mlp.fc1,
    "head": lambda model: model.head,
}


def test_patches_behind_the_last_attention_do_not_matter_where_the_class_token_is_read() -> None:
    model = vit("token")
    found = token_importance(model, {name: of(model) for name, of in LAYERS.items()}, [torch.randn(3, 3, 32, 32)])
    assert {name: len(weights) for name, weights in found.items()} == {
        "patch_embed.proj": 3 * 16, "blocks.0.mlp.fc2": 3 * 17, "blocks.1.attn.qkv": 3 * 17,
        "blocks.1.attn.proj": 3 * 17, "blocks.1.mlp.fc1": 3 * 17, "head": 3,
    }  # fmt: skip
    for name in ("blocks.1.attn.proj", "blocks.1.mlp.fc1"):
        by_image = found[name].view(3, 17)
        assert (by_image[:, 0] > 0).all()
        assert not by_image[:, 1:].any()
    for name in ("patch_embed.proj", "blocks.0.mlp.fc2", "blocks.1.attn.qkv", "head"):
        assert (found[name] > 0).all(), name
        assert found[name].mean() == pytest.approx(1, rel=1e-5)


def test_every_patch_matters_where_all_are_averaged() -> None:
    model = vit("avg")
    found = token_importance(model, {name: of(model) for name, of in LAYERS.items()}, [torch.randn(2, 3, 32, 32)])
    assert len(found["blocks.1.mlp.fc1"]) == 2 * 16
    assert all((weights > 0).all() for weights in found.values())


def test_the_same_twice_and_no_trace_left() -> None:
    model = vit("token")
    images = torch.randn(2, 3, 32, 32)
    layers = {name: of(model) for name, of in LAYERS.items()}
    first, second = (token_importance(model, layers, [images.clone()]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in layers)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_weights_change_nothing() -> None:
    model = vit("token")
    images = torch.randn(2, 3, 32, 32)
    layers = {name: of(model) for name, of in LAYERS.items()}
    trained = token_importance(model, layers, [images.clone()])
    model.requires_grad_(False)
    frozen = token_importance(model, layers, [images.clone()])
    for name in layers:
        torch.testing.assert_close(frozen[name], trained[name])


def test_where_nothing_reaches_the_logits_all_count_alike() -> None:
    """A head of zeros, as a new classifier may begin: no division by zero follows."""
    model = vit("token")
    nn.init.zeros_(model.head.weight)
    layers = {name: of(model) for name, of in LAYERS.items()}
    found = token_importance(model, layers, [torch.randn(2, 3, 32, 32)])
    assert torch.equal(found["blocks.0.mlp.fc2"], torch.ones(2 * 17))
    assert (found["head"] > 0).all()


def test_layers_that_are_not_called_are_left_out_and_those_without_effect_count_alike() -> None:
    class Loose(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.ignored = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.ignored(x)
            return super().forward(x)

    torch.manual_seed(0)
    model = Loose()
    layers = {name: model.get_submodule(name) for name in ("first", "idle", "ignored")}
    found = token_importance(model, layers, [torch.randn(2, TOKENS, 3)])
    assert set(found) == {"first", "ignored"}
    assert torch.equal(found["ignored"], torch.ones(2 * TOKENS))


def test_tokens_that_do_not_matter_count_a_little() -> None:
    """Or weights would learn the few tokens that do by heart."""
    counted = tempered(torch.tensor([0.0, 0.5, 2.5]))
    torch.testing.assert_close(counted, torch.tensor([0.3, 0.65, 2.05]))
    assert counted.mean() == pytest.approx(1)
