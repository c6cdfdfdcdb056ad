"""Late biases: where they are taken, and that gradients are those of plain autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp
from torch import Tensor, nn

from vit_efficient.attention import sdpa
from vit_efficient.attention.sdpa import SdpaBackend
from vit_efficient.attention.swap import swap_attention
from vit_efficient.model import late_bias
from vit_efficient.model.build import for_speed
from vit_efficient.model.gelu import CompiledGELU, gelu
from vit_efficient.model.late_bias import LateMlp, late_biases
from vit_efficient.parallel.order import prepare_blocks


def vit(**words: Any) -> Any:
    """Two blocks of a small ViT, as a recipe has them."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes | words)
    for parameter in model.parameters():  # timm begins with biases of 0
        nn.init.normal_(parameter, std=0.2)
    for_speed(model)
    swap_attention(model, SdpaBackend())
    return model.train()


def gradients(model: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def near(found: dict[str, Tensor], expected: dict[str, Tensor], most: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name].float() - wanted.float()).norm() <= most * wanted.float().norm(), name


def prepare(model: Any, *, checkpointing: bool, compile: bool) -> None:
    """Each block as it is trained; compiled whole, by a compiler that is quick."""
    if compile:
        torch.compiler.reset()
    prepare_blocks(model.blocks, checkpointing=checkpointing, compile=False)
    for block in model.blocks if compile else ():
        block.compile(backend="aot_eager", fullgraph=True)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late on every device, in every precision, compiled or not; GELU's polynomial for both."""
    monkeypatch.setattr(late_bias, "late", lambda x: torch.is_grad_enabled())
    monkeypatch.setattr(CompiledGELU, "forward", lambda self, x: gelu(x))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_gradients_are_those_of_plain_autograd(compile: bool, checkpointing: bool) -> None:
    plain, x = vit(), torch.randn(3, 3, 32, 32)
    model = copy.deepcopy(plain)
    late_biases(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    prepare(model, checkpointing=checkpointing, compile=compile)
    near(gradients(model, x), gradients(plain, x))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain.eval()(x))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("part", ["gelu", "heads"])
def test_each_alone(part: str) -> None:
    plain, x = vit(), torch.randn(3, 3, 32, 32)
    model = copy.deepcopy(plain)
    late_biases(model)
    for block in model.blocks:
        if part == "gelu":
            block.attn.attended = None
        else:
            block.mlp.__class__ = Mlp
    near(gradients(model, x), gradients(plain, x))


def plain_attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What `_attend` asks of cuDNN, in plain PyTorch."""
    s = scale * (q @ k.mT)
    return (s.softmax(-1) @ v).transpose(1, 2).contiguous().transpose(1, 2), s.logsumexp(-1, keepdim=True)


@pytest.fixture
def short(forced: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Attention by its own backward pass, wherever it is alone between its projections; notes each forward pass."""
    attended: list[str] = []
    noted = torch.compiler.disable(lambda: attended.append("short"))

    def attend(*given: Any) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            noted()
        return plain_attend(*given)

    monkeypatch.setattr(late_bias, "_short", lambda backend, qkv, heads: True)
    monkeypatch.setattr(late_bias, "_attend", attend)
    return attended


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compile", [False, True])
def test_short_attention_has_the_same_gradients(compile: bool, checkpointing: bool, short: list[str]) -> None:
    plain, x = vit(), torch.randn(3, 3, 32, 32)
    model = copy.deepcopy(plain)
    late_biases(model)
    prepare(model, checkpointing=checkpointing, compile=compile)
    near(gradients(model, x), gradients(plain, x))
    if not compile:
        assert len(short) == (4 if checkpointing else 2)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain.eval()(x))


@pytest.mark.parametrize("trained", ["qkv.bias", "qkv.weight", "attn.proj", "head"])
def test_short_attention_with_frozen_weights_another_scale_and_any_batch(trained: str, short: list[str]) -> None:
    plain = vit()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(trained in name)
    for block in plain.blocks:
        block.attn.scale = 0.7
    model = copy.deepcopy(plain)
    late_biases(model)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 2, 5):
        x = torch.randn(batch, 3, 32, 32)
        for one in (model, plain):
            one.zero_grad()
            one(x).square().sum().backward()
        for (name, found), (_, wanted) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert (found.grad is None) == (wanted.grad is None) == (trained not in name), name
            if wanted.grad is not None:
                assert (found.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm(), name


@pytest.mark.parametrize("words", [{"qk_norm": True}, {"attn_drop_rate": 0.5}])
def test_what_lies_between_projections_keeps_pytorchs_attention(words: dict[str, Any], short: list[str]) -> None:
    model = vit(**words)
    late_biases(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not short
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_mask_keeps_pytorchs_attention(short: list[str]) -> None:
    plain, x = vit().blocks[0].attn, torch.randn(2, 17, 24)
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    attention = copy.deepcopy(plain)
    late_biases(attention)
    torch.testing.assert_close(attention(x, attn_mask=mask), plain(x, attn_mask=mask))
    assert not short
    torch.testing.assert_close(attention(x), plain(x))
    assert short


@pytest.mark.usefixtures("forced")
def test_pytorch_attends_where_cudnn_is_not_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it never is; where it is forced, chosen otherwise, or for sequences that are long, it is not asked."""
    qkv = torch.randn(2, 17, 3 * 128, dtype=torch.bfloat16)
    monkeypatch.setattr(late_bias, "_timed", lambda index: True)
    assert not late_bias._short(SdpaBackend(), qkv, 2)
    for kernel, short in {"cudnn": True, "flash": False, None: False}.items():
        monkeypatch.setattr(sdpa, "_fastest", lambda *given, kernel=kernel: kernel)
        assert late_bias._short(SdpaBackend(), qkv, 2) is short
        assert not late_bias._short(SdpaBackend("cudnn"), qkv, 2)
        assert not late_bias._short(SdpaBackend(), qkv.float(), 2)
        assert not late_bias._short(SdpaBackend(), torch.randn(1, 300, 384).bfloat16(), 2)
        assert not late_bias._short(SdpaBackend(), qkv, 16)
    monkeypatch.setattr(sdpa, "_fastest", lambda *given: "cudnn")
    monkeypatch.setattr(late_bias, "_timed", lambda index: False)
    assert not late_bias._short(SdpaBackend(), qkv, 2)


@pytest.mark.usefixtures("forced")
def test_a_copy_has_its_own_biases_and_frozen_ones_no_gradient() -> None:
    model, x = vit(), torch.randn(2, 3, 32, 32)
    late_biases(model)
    other = copy.deepcopy(model)
    other.blocks[0].mlp.fc1.bias.requires_grad_(False)
    other.blocks[1].attn.qkv.bias.requires_grad_(False)
    other(x).sum().backward()
    assert other.blocks[0].mlp.fc1.bias.grad is None
    assert other.blocks[1].attn.qkv.bias.grad is None
    assert other.blocks[1].mlp.fc1.bias.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures("forced")
def test_a_bias_that_was_replaced_is_the_one_that_is_trained() -> None:
    """As FSDP2 does it around a forward pass."""
    model, x = vit(), torch.randn(2, 3, 32, 32)
    late_biases(model)
    fc1, before = model.blocks[0].mlp.fc1, model.blocks[0].mlp.fc1.bias
    fc1.bias = nn.Parameter(before.detach().clone())
    model(x).sum().backward()
    assert before.grad is None
    assert fc1.bias.grad is not None


def test_only_plain_layers() -> None:
    class Other(nn.Linear):
        pass

    model = vit(qkv_bias=False)
    model.blocks[0].mlp.fc1.__class__ = Other
    model.blocks[1].mlp = GluMlp(24, 96, act_layer=type(model.blocks[1].mlp.act))
    late_biases(model)
    assert not any(isinstance(module, LateMlp) for module in model.modules())
    assert all(block.attn.attended is None for block in model.blocks)


def test_layers_with_hooks_are_called_as_they_are() -> None:
    model = vit()
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *given: None)
    model.blocks[1].attn.qkv.register_forward_pre_hook(lambda *given: None)
    late_biases(model)
    assert [type(block.mlp) is LateMlp for block in model.blocks] == [False, True]
    assert [block.attn.attended is not None for block in model.blocks] == [True, False]


@pytest.mark.usefixtures("forced")
def test_a_broken_program_has_each_gradient_once() -> None:
    """Whatever the compiler leaves to PyTorch in between: a break behind fc1, and one in front of attention."""
    plain, x = vit(), torch.randn(3, 3, 32, 32)
    model = copy.deepcopy(plain)
    late_biases(model)
    for block in model.blocks:
        block.mlp.drop1.register_forward_hook(torch.compiler.disable(lambda *given: None))
        block.attn.attn_drop.register_forward_hook(torch.compiler.disable(lambda *given: None))
        block.compile(backend="aot_eager")
    near(gradients(model, x), gradients(plain, x))


def test_on_a_cpu_it_is_pytorchs_own() -> None:
    plain, x = vit(), torch.randn(3, 3, 32, 32)
    model = copy.deepcopy(plain)
    late_biases(model)
    late_biases(model)  # twice is once
    for name, found in gradients(model, x).items():
        assert torch.equal(found, dict(gradients(plain, x))[name])


@pytest.mark.parametrize("autocast", [False, True])
def test_programs_ask_without_a_break(autocast: bool) -> None:
    """The question itself, with nothing patched, is a constant of the program, on a CPU no."""
    torch.compiler.reset()
    layer = torch.compile(lambda x: (late_bias.late(x), x + 1), backend="eager", fullgraph=True)
    with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=autocast):
        on_gpu = torch.cuda.is_available()
        assert layer(torch.ones(3, device="cuda" if on_gpu else "cpu"))[0] is (on_gpu and autocast)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("short", [False, True])
def test_compiled_in_bf16_on_a_gpu(short: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever backward pass attention has: which it has is measured, so it is chosen here."""
    torch.compiler.reset()
    plain, x = vit(embed_dim=192).cuda(), torch.randn(16, 3, 32, 32, device="cuda")
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.05)
    model = copy.deepcopy(plain)
    late_biases(model)
    prepare_blocks(model.blocks, checkpointing=checkpointing, compile=True)
    wanted = gradients(plain, x)
    monkeypatch.setattr(sdpa, "_fastest", lambda *given: "cudnn" if short else "flash")
    called = []
    from vit_efficient.kernels.attention_gradient import triton as attention
    from vit_efficient.kernels.bias_gradient import triton as biases

    behind = "attention_gradient" if short else "heads_gradient"
    for module, name in ((biases, "gelu_gradient"), (biases, "heads_gradient"), (attention, "attention_gradient")):
        inner = getattr(module, name)
        record = lambda *given, name=name, inner=inner: (called.append(name), inner(*given))[1]  # noqa: E731
        monkeypatch.setattr(module, name, record)
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(model, x)
    assert sorted(called) == sorted(["gelu_gradient", behind] * 2)
    near(found, wanted, 2e-2)
