"""Swapped models equal timm's own, output and every gradient, for every family of Vision Transformer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from vit_efficient.attention.base import AttentionBackend
from vit_efficient.attention.flash2 import Flash2Config
from vit_efficient.attention.modules import BackendAttention
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import head_widths, swap_attention
from vit_efficient.errors import CapabilityError, UserError

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}

# Name, arguments, and the number of attentions. 40 pixels in patches of 8 make 25 tokens and the prefix: ragged.
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 40, "patch_size": 8}, 2),
    "vit-square": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}, 2),
    "vit-one-patch": ("vit_tiny_patch16_224", {"img_size": 8, "patch_size": 8}, 2),
    "vit-qk-norm": ("vit_tiny_patch16_224", {"img_size": 40, "patch_size": 8, "qk_norm": True}, 2),
    "vit-scale-norm": ("vit_tiny_patch16_224", {"img_size": 40, "patch_size": 8, "scale_attn_norm": True}, 2),
    "vit-no-qkv-bias": ("vit_tiny_patch16_224", {"img_size": 40, "patch_size": 8, "qkv_bias": False}, 2),
    "vit-parallel-things": ("vit_small_patch16_18x2_224", {"img_size": 40, "patch_size": 8}, 4),
    "vit-post-norm": ("vit_base_patch16_rpn_224", {"img_size": 40, "patch_size": 8}, 2),
    "vit-relpos": ("vit_relpos_small_patch16_224", {"img_size": 40, "patch_size": 8}, 2),
    "vit-relpos-shared": ("vit_srelpos_small_patch16_224", {"img_size": 40, "patch_size": 8}, 2),
    "vit-rope": ("vit_small_patch16_rope_224", {"img_size": 40, "patch_size": 8, "embed_dim": 72}, 2),
    "vit-rope-mixed": ("vit_small_patch16_rope_mixed_224", {"img_size": 40, "patch_size": 8, "embed_dim": 72}, 2),
    "vit-diff": ("vit_dlittle_patch16_reg1_gap_256", {"img_size": 40, "patch_size": 8}, 2),
    "vit-diff-dual": ("vit_dwee_patch16_reg1_gap_256", {"img_size": 40, "patch_size": 8}, 2),
    "vit-map-pool": ("vit_base_patch16_siglip_224", {"img_size": 40, "patch_size": 8}, 3),
    "vit-prr-pool": ("vit_tiny_patch16_224", {"img_size": 40, "patch_size": 8, "global_pool": "prr"}, 3),
    "deit": ("deit_tiny_patch16_224", {"img_size": 40, "patch_size": 8}, 2),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 40, "patch_size": 8}, 2),
    "deit3": ("deit3_small_patch16_224", {"img_size": 40, "patch_size": 8}, 2),
    "beit": ("beit_base_patch16_224", {"img_size": 40, "patch_size": 8}, 2),
    "beit-shared": (
        "beit_base_patch16_224",
        {"img_size": 40, "patch_size": 8, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        2,
    ),
    "eva02-tiny-fused": ("eva02_tiny_patch14_224", {"img_size": 40, "patch_size": 8}, 2),
    "eva02-tiny-split": ("eva02_tiny_patch14_224", {"img_size": 40, "patch_size": 8, "qkv_fused": False}, 2),
    "eva02-base": ("eva02_base_patch14_224", {"img_size": 40, "patch_size": 8}, 2),
    "eva02-large": ("eva02_large_patch14_224", {"img_size": 40, "patch_size": 8}, 2),
    "eva02-enormous": ("eva02_enormous_patch14_clip_224", {"img_size": 40, "patch_size": 8}, 2),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"img_size": 35, "patch_size": 7}, 2),
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 40, "patch_size": 8}, 2),
    "dinov3-qkv-bias": ("vit_small_patch16_dinov3_qkvb", {"img_size": 40, "patch_size": 8}, 2),
    "dinov3-7b": ("vit_7b_patch16_dinov3", {"img_size": 40, "patch_size": 8}, 2),
}


def make(case: str) -> nn.Module:
    """A small model whose every parameter is far from zero, one and its neighbours, so that a mix-up shows."""
    name, arguments, _ = MODELS[case]
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, **{**SMALL, **arguments})
    except (RuntimeError, TypeError) as error:
        pytest.skip(f"timm {timm.__version__} has no {name} with {arguments}: {error}")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def images(model: nn.Module, batch: int = 2) -> Tensor:
    height, width = model.patch_embed.img_size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def relative(got: Tensor, wanted: Tensor) -> float:
    """Distance relative to the wanted tensor's norm. Some gradients are zero but for rounding (softmax does not see a
    bias that all keys share); those are compared absolutely."""
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-2))


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradient of every parameter and of the input."""
    x = x.clone().requires_grad_()
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad((y * weight).sum(), [x, *named.values()], allow_unused=True)
    return y.detach(), {n: g for n, g in zip(["input", *named], grads, strict=True) if g is not None}


@pytest.mark.parametrize("kernel", ["math", "auto"])
@pytest.mark.parametrize("case", MODELS)
def test_output_and_gradients_equal_those_of_timm(case: str, kernel: Any) -> None:
    original = make(case)
    swapped = copy.deepcopy(original)
    keys = list(swapped.state_dict())
    parameters = [name for name, _ in swapped.named_parameters()]

    count = swap_attention(swapped, SdpaConfig(kernel=kernel).build())

    assert count == MODELS[case][2]
    assert list(swapped.state_dict()) == keys
    assert [name for name, _ in swapped.named_parameters()] == parameters
    x = images(original)
    wanted, wanted_grads = gradients(original, x)
    got, got_grads = gradients(swapped, x)
    assert relative(got, wanted) < 2e-6
    assert got_grads.keys() == wanted_grads.keys()
    worst = {name: relative(got_grads[name], wanted_grads[name]) for name in wanted_grads}
    assert max(worst.values()) < 3e-5, sorted(worst.items(), key=lambda item: -item[1])[:3]


@pytest.mark.parametrize("case", ["vit", "beit", "eva02-tiny-fused", "eva02-base", "dinov3"])
def test_small_logits_keep_their_mean(case: str) -> None:
    """Attention near uniform is where a kernel that counts padded keys goes wrong without large errors elsewhere."""
    original = make(case)
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if "qkv" in name or "q_proj" in name or "k_proj" in name:
                parameter *= 1e-2
    swapped = copy.deepcopy(original)
    swap_attention(swapped, SdpaConfig().build())
    x = images(original)
    assert relative(swapped(x), original(x)) < 2e-6


@pytest.mark.parametrize("case", ["vit", "eva02-base", "dinov3", "vit-parallel-things"])
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
def test_masks_equal_those_of_timm(case: str, kind: str) -> None:
    original = make(case)
    swapped = copy.deepcopy(original)
    swap_attention(swapped, SdpaConfig().build())
    x = images(original)
    tokens = original.forward_features(x).shape[1]
    masks: dict[str, dict[str, Any]] = {
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.rand(tokens, tokens) > 0.3},
        "additive": {"attn_mask": torch.randn(tokens, tokens)},
    }
    masked = original.forward_features(x, **masks[kind])
    assert relative(swapped.forward_features(x, **masks[kind]), masked) < 2e-6
    assert relative(original.forward_features(x), masked) > 1e-3  # the mask does something


# What timm's layers can do and none of its registered models of today does.
LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "grouped": (AttentionRope, {"num_heads": 6, "num_kv_heads": 2, "qkv_fused": False, "rotate_half": True}),
    "gated": (Attention, {"num_heads": 3, "gated": True}),
    "gated-rope": (AttentionRope, {"num_heads": 3, "gated": True, "num_prefix_tokens": 5, "rotate_half": False}),
    "gated-eva": (EvaAttention, {"num_heads": 3, "gated": True, "scale_norm": True, "norm_layer": nn.LayerNorm}),
    "narrow-heads": (Attention, {"num_heads": 3, "attn_head_dim": 8}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_single_layers_equal_those_of_timm(case: str) -> None:
    cls, arguments = LAYERS[case]
    torch.manual_seed(0)
    try:
        original = nn.Sequential(cls(48, **arguments)).eval()
    except TypeError as error:
        pytest.skip(f"timm {timm.__version__}: {error}")
    with torch.no_grad():
        for parameter in original.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    swapped = copy.deepcopy(original)
    swap_attention(swapped, SdpaConfig().build())
    x = torch.randn(2, 10, 48)
    patches = 10 - getattr(original[0], "num_prefix_tokens", 0)
    rope = {} if cls is Attention else {"rope": torch.randn(patches, 2 * original[0].head_dim)}
    assert relative(swapped[0](x, **rope), original[0](x, **rope)) < 2e-6


def test_dropout_acts_in_training_only_and_is_reproducible() -> None:
    name, arguments, _ = MODELS["vit"]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **arguments}, attn_drop_rate=0.5)
    original = copy.deepcopy(model)
    swap_attention(model, SdpaConfig().build())
    x = images(model)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    original.train()
    torch.manual_seed(1)
    first, second = model(x), model(x)
    assert not torch.allclose(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(x), first)
    torch.manual_seed(1)
    assert relative(first, original(x)) < 2e-6  # the very same weights are dropped


def test_drop_out_after_the_projection_is_kept() -> None:
    name, arguments, _ = MODELS["vit"]
    model = timm.create_model(name, **{**SMALL, **arguments}, proj_drop_rate=0.5)
    swap_attention(model, SdpaConfig().build())
    model.train()
    y = model.blocks[0].attn(torch.randn(4, 26, 48))
    assert 0.4 < (y == 0).float().mean() < 0.6


@pytest.mark.parametrize("case", ["vit", "eva02-tiny-fused", "eva02-base", "beit", "dinov3"])
def test_every_projection_runs_through_its_submodule(case: str) -> None:
    """So that a quantized layer or an adapter in its place takes effect."""
    model = make(case)
    swap_attention(model, SdpaConfig().build())
    attention = model.blocks[0].attn
    linear = [name for name, module in attention.named_children() if isinstance(module, nn.Linear)]
    assert linear
    called = []
    for name in linear:
        getattr(attention, name).register_forward_hook(lambda *_, name=name: called.append(name))
    model(images(model))
    assert sorted(called) == sorted(linear)


def test_parameters_are_the_same_objects_and_training_mode_is_kept() -> None:
    model = make("vit")
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    before = dict(model.named_parameters())
    model.blocks[1].train()
    swap_attention(model, SdpaConfig().build())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    assert not model.blocks[0].attn.training
    assert model.blocks[1].attn.attn_drop.training


def test_buffers_that_are_not_saved_stay_so() -> None:
    model = make("beit")
    swap_attention(model, SdpaConfig().build())
    attention = model.blocks[0].attn
    assert {"k_bias", "relative_position_index"} <= {name for name, _ in attention.named_buffers()}
    assert not {"k_bias", "relative_position_index"} & attention.state_dict().keys()


def test_swapping_again_replaces_the_backend() -> None:
    model = make("vit")
    swap_attention(model, SdpaConfig(kernel="math").build())
    second = SdpaConfig(kernel="auto").build()
    assert swap_attention(model, second) == 2
    assert all(m.backend is second for m in model.modules() if isinstance(m, BackendAttention))


def test_head_widths() -> None:
    model = make("vit")
    swap_attention(model, SdpaConfig().build())
    assert head_widths(model) == {16}


class RecordingBackend(AttentionBackend):
    """Notes the dtypes that it is given."""

    name = "recording"
    takes_bias = True

    def __init__(self) -> None:
        self.dtypes: set[tuple[torch.dtype, ...]] = set()

    def attend(self, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor, **_: Any) -> Tensor:
        self.dtypes.add((q_BHNE.dtype, k_BHNE.dtype, v_BHNE.dtype))
        return v_BHNE


@pytest.mark.parametrize("case", ["vit", "vit-qk-norm", "eva02-tiny-fused", "dinov3", "dinov3-7b", "vit-map-pool"])
def test_under_autocast_a_backend_gets_half_precision(case: str) -> None:
    """Norms and rotary tables are float32 under autocast, and flash kernels want one half-precision dtype."""
    model = make(case)
    backend = RecordingBackend()
    swap_attention(model, backend)
    with torch.autocast("cpu", torch.bfloat16):
        model(images(model))
    assert backend.dtypes == {(torch.bfloat16,) * 3}


@pytest.mark.parametrize("case", ["vit-qk-norm", "vit-map-pool"])
def test_norms_that_go_up_to_float32_do_not_take_the_backend_along(case: str) -> None:
    """As LayerNorm does under CUDA's autocast, which the CPU's does not imitate."""
    model = make(case)
    for name, module in model.named_modules():
        if name.endswith(("q_norm", "k_norm")):
            module.register_forward_hook(lambda _module, _inputs, output: output.float())
    backend = RecordingBackend()
    swap_attention(model, backend)
    with torch.autocast("cpu", torch.bfloat16):
        model(images(model))
    assert backend.dtypes == {(torch.bfloat16,) * 3}


@pytest.mark.parametrize("case", ["vit", "eva02-tiny-fused", "beit"])
@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_compiles_without_a_graph_break(case: str, kernel: Any) -> None:
    model = make(case)
    swap_attention(model, SdpaConfig(kernel=kernel).build())
    x = torch.randn(2, 26, 48)
    layer = model.blocks[0].attn
    arguments = {"rope": model.rope.get_embed()} if case.startswith("eva02") else {}
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x, **arguments), layer(x, **arguments)) < 2e-6


@pytest.mark.parametrize(
    ("name", "unknown"),
    [("vit_base_patch16_xp_224", "ParallelScalingBlock"), ("cait_xxs24_224", "TalkingHeadAttn")],
)
def test_unknown_attention_is_refused_by_its_class_name(name: str, unknown: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=unknown):
        swap_attention(model, SdpaConfig().build())
    assert [type(module) for module in model.modules()] == before


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(UserError, match="no attention"):
        swap_attention(nn.Sequential(nn.Linear(2, 2)), SdpaConfig().build())


@pytest.mark.parametrize("case", ["beit", "vit-relpos"])
def test_a_backend_without_bias_refuses_relative_positions_and_leaves_the_model(case: str) -> None:
    model = make(case)
    x = images(model)
    wanted = model(x)
    with pytest.raises(CapabilityError, match="relative position bias"):
        swap_attention(model, Flash2Config().build())
    assert not any(isinstance(module, BackendAttention) for module in model.modules())
    assert torch.equal(model(x), wanted)
