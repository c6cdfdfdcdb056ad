"""Fused blocks equal the blocks that they stand for: codes, logits, names and files; what they do not know stays."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from vit_efficient.attention.padding import pad_tokens
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import UserError
from vit_efficient.kernels.layernorm_quant.op import layernorm_quant
from vit_efficient.kernels.linear import op as linear
from vit_efficient.kernels.quantize import op as quantization
from vit_efficient.kernels.quantize.reference import smoothed
from vit_efficient.model.fused import FusedBlock, fuse_blocks, unfuse_blocks
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.fused_linear import Codes, FusedLinear
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.int8_attention import Int8Attend
from vit_efficient.quantization.int8_deployed import DeployedInt8

SMALL = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8}),
    "qk_norm": ("vit_tiny_patch16_224", {"patch_size": 8, "qk_norm": True}),
    "inner_norms": ("vit_tiny_patch16_224", {"patch_size": 8, "scale_attn_norm": True, "scale_mlp_norm": True}),
    "quick_gelu": ("vit_tiny_patch16_224", {"patch_size": 8, "act_layer": "quick_gelu"}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8, "init_values": 0.3}),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2", {"patch_size": 8, "init_values": 0.3, "mlp_ratio": 2.0}),
    "dinov3": ("vit_small_patch16_dinov3", {"patch_size": 8, "init_values": 0.3}),
    "dinov3_qkv_bias": ("vit_small_patch16_dinov3_qkvb", {"patch_size": 8, "init_values": 0.3}),
    "siglip": ("vit_base_patch16_siglip_224", {"patch_size": 8}),
    "eva02_fused_qkv": ("eva02_tiny_patch14_224", {"patch_size": 8, "mlp_ratio": 2.0}),
    "eva02_split_qkv": ("eva02_base_patch14_224", {"patch_size": 8, "mlp_ratio": 2.0}),
    "gated_attention": ("eva02_base_patch14_224", {"patch_size": 8, "mlp_ratio": 2.0}),
    "beit": ("beit_base_patch16_224", {"patch_size": 8, "init_values": 0.3}),
    "relpos": ("vit_relpos_small_patch16_224", {"patch_size": 8, "init_values": 0.3}),
}  # fmt: skip
QUANTIZATIONS: dict[str, Any] = {
    "int8": Int8Config(),
    "int8_per_tensor_weights": Int8Config(weights="tensor"),
    "int8_per_tensor": Int8Config(dynamic_scale="tensor"),
    "w4a8": Int8Config(weight_bits=4),
    "w4a8_groups": Int8Config(weight_bits=4, group=32, zero_point=True),
    "w4a4": Int8Config(weight_bits=4, activation_bits=4),
    "integer_attention": Int8Config(attention="dynamic"),
    "integer_attention_static": Int8Config(attention="static", activations="hybrid"),
    "integer_attention_static_plain": Int8Config(
        attention="static", activations="hybrid", calibration=CalibrationConfig(shift=False, smooth=None)
    ),
    "integer_attention_float_values": Int8Config(attention="dynamic", attention_values="float"),
    "integer_attention_fp8_values": Int8Config(attention="dynamic", attention_values="fp8", weights="tensor"),
    "integer_attention_blocks": Int8Config(attention="dynamic", attention_values="float", attention_keys="block"),
    "integer_attention_blocks_static_plain": Int8Config(
        attention="dynamic",
        attention_values="fp8",
        attention_keys="block",
        activations="hybrid",
        calibration=CalibrationConfig(shift=False, smooth=None),
    ),
    "integer_attention_float_values_static_plain": Int8Config(
        attention="static",
        attention_values="float",
        activations="hybrid",
        calibration=CalibrationConfig(shift=False, smooth=None),
    ),
    "static": Int8Config(activations="static"),
    "hybrid": Int8Config(activations="hybrid"),
    "hybrid_smooth": Int8Config(activations="hybrid", calibration=CalibrationConfig(smooth=0.5)),
    "hybrid_shift": Int8Config(activations="hybrid", calibration=CalibrationConfig(smooth=None)),
    "static_smooth": Int8Config(activations="static", calibration=CalibrationConfig(smooth=0.5)),
    "hybrid_plain": Int8Config(activations="hybrid", calibration=CalibrationConfig(shift=False, smooth=None)),
    "smooth": Int8Config(calibration=CalibrationConfig(smooth=0.5)),
    "fp8": Fp8Config(),
    "fp8_per_tensor": Fp8Config(activations="tensor", weights="tensor"),
    "fp8_static": Fp8Config(activations="static"),
    "fp8_hybrid": Fp8Config(activations="hybrid"),
    "fp8_attention": Fp8Config(attention="fp8"),
    "fp8_attention_hybrid": Fp8Config(attention="fp8", attention_values="fp8", activations="hybrid"),
    "fp8_shift": Fp8Config(calibration=CalibrationConfig()),
}


def plain(family: str, **more: Any) -> nn.Module:
    """A small float model of a family, all of its parameters random (norms, layer scales and biases too)."""
    torch.manual_seed(0)
    name, kwargs = FAMILIES[family]
    model = timm.create_model(name, **{**SMALL, **kwargs, **more}).eval()
    if family == "gated_attention":  # timm gives such blocks to other models
        model.blocks = nn.ModuleList(EvaBlock(48, 3, gated_attn=True, qkv_fused=False, init_values=0.3) for _ in "12")
        model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    swap_attention(model, SdpaConfig().build())
    return model


def deployed(family: str, config: Any, **more: Any) -> nn.Module:
    model = plain(family, **more)
    config.apply(model, compute_dtype=torch.float32)
    if config.needs_calibration:
        torch.manual_seed(1)
        calibrate(model, [torch.randn(16, 3, 32, 32)], config.calibration or CalibrationConfig())
    config.finalize(model)
    return model.eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def check_logits(model: nn.Module, found: Tensor, wanted: Tensor) -> None:
    if type(model).__name__ == "VisionTransformerRelPos":
        # Its tokens are a strided view of the patch embedding; fused blocks make them contiguous, and the mean over
        # tokens then adds in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert found.equal(wanted)


def check_equal(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code that enters a layer of a block, and the logits, are the same bit for bit with fused blocks."""
    entered: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    hooks = [
        module.register_forward_pre_hook(lambda layer, x: entered.update({names[layer]: layer.codes(x[0])[0]}))
        for name, module in model.named_modules()
        if hasattr(module, "codes") and name.startswith("blocks.") and "rel_pos" not in name
    ]
    assert len(hooks) >= 8
    with torch.no_grad():
        wanted = model(images())
    for hook in hooks:
        hook.remove()
    assert fuse_blocks(model).count() == "2 of 2 blocks fused"
    seen: dict[str, Tensor] = {}
    operands = FusedLinear._operands

    def watch(self: FusedLinear, x: Any) -> Any:
        seen[names[self.layer]] = x.values.reshape(-1, x.values.shape[-1])
        return operands(self, x)

    by_groups = FusedLinear._by_groups

    def watch_groups(self: FusedLinear, x: Any, *rest: Any) -> Tensor:
        seen[names[self.layer]] = x.values.reshape(-1, x.values.shape[-1])
        return by_groups(self, x, *rest)

    monkeypatch.setattr(FusedLinear, "_operands", watch)
    monkeypatch.setattr(FusedLinear, "_by_groups", watch_groups)
    with torch.no_grad():
        found = model(images())
    assert seen.keys() == entered.keys()
    different = [name for name in entered if not seen[name].float().equal(entered[name].float())]
    assert not different
    check_logits(model, found, wanted)
    assert len(wanted.unique()) > 7


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_equal_bit_for_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(deployed(family, QUANTIZATIONS["int8"]), monkeypatch)


@pytest.mark.parametrize("family", ["inner_norms", "dinov2_giant", "dinov3", "siglip", "gated_attention"])
def test_families_in_fp8_are_equal_bit_for_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(deployed(family, QUANTIZATIONS["fp8"]), monkeypatch)


@pytest.mark.parametrize("family", ["vit", "eva02_split_qkv"])
@pytest.mark.parametrize("config", QUANTIZATIONS)
def test_every_scheme_is_equal_bit_for_bit(family: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(deployed(family, QUANTIZATIONS[config]), monkeypatch)


@pytest.mark.parametrize("family", ["dinov2", "eva02_fused_qkv", "eva02_split_qkv", "beit"])
def test_names_files_and_unfusing(family: str) -> None:
    model = deployed(family, QUANTIZATIONS["hybrid"])
    with torch.no_grad():
        wanted = model(images())
    before, described = deployed_state(model)
    types = {name: type(module) for name, module in model.named_modules()}
    fuse_blocks(model)
    assert sum(isinstance(module, FusedBlock) for module in model.modules()) == 2
    after, still = deployed_state(model)
    assert described == still
    assert list(before) == list(after)
    assert all(before[name].equal(after[name]) for name in before)
    again = fuse_blocks(model)  # and changes nothing
    assert again.count() == "2 of 2 blocks fused"
    assert list(again.passes) == ["blocks.0", "blocks.1"]

    fresh = plain(family)
    load_deployed(fresh, after, still)
    fuse_blocks(fresh)
    with torch.no_grad():
        check_logits(fresh, fresh(images()), wanted)

    unfuse_blocks(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    with torch.no_grad():
        assert model(images()).equal(wanted)


def test_what_is_loaded_into_fused_blocks_counts() -> None:
    model, other = (deployed("eva02_split_qkv", QUANTIZATIONS["static"]) for _ in range(2))
    with torch.no_grad():
        for name, tensor in other.named_buffers():
            if name.endswith(("smooth", "shift", "weight_scale")):
                tensor.mul_(1.5)
        other.blocks[0].gamma_1 = None  # EVA02 has none
        wanted = other(images())
    fuse_blocks(model)
    folded = model.blocks[0].attn_input.made[0].weight.clone()
    narrow = other.blocks[0].attn.proj  # EVA02 has an identity before it
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert model(images()).equal(wanted)
    assert not model.blocks[0].attn_input.made[0].weight.equal(folded)
    assert model.blocks[0].attn_output.reciprocal.equal(1 / narrow.smooth)
    model.to(torch.bfloat16)
    assert model.blocks[0].attn_output.reciprocal.equal(1 / narrow.smooth)


@pytest.mark.parametrize("config", ["static_smooth", "hybrid_smooth", "fp8_shift"])
def test_shift_and_smoothing_fold_into_the_norm(config: str) -> None:
    """What a GPU computes from: the norm's own vectors, changed. Here their norm is held against the steps."""
    model = deployed("vit", QUANTIZATIONS[config])
    fuse_blocks(model)
    for made in (model.blocks[0].attn_input.made[0], model.blocks[1].mlp_input.made[0]):
        norm, layer = made.held
        assert made.folds
        assert layer.shifts == (config != "hybrid_smooth")  # of tokens' own scales only fp8 has one
        assert layer.smooths == (config != "fp8_shift")
        shift, smooth = layer.vectors
        x = torch.randn(40, 17, 48)
        step_by_step = smoothed(norm(x), shift, smooth)
        at_once = nn.functional.layer_norm(x, (48,), made.weight, made.bias, norm.eps)
        torch.testing.assert_close(at_once, step_by_step, rtol=1e-5, atol=1e-5)
        codes = layernorm_quant(x, made.weight, made.bias, norm.eps, layer.form, layer.input_scale)
        wanted = layer.codes(norm(x))
        assert (codes[0].float() == wanted.values.float()).float().mean() > 0.999
        torch.testing.assert_close(codes[1], wanted.scale, rtol=1e-5, atol=0)
    model.to(torch.bfloat16)
    assert made.weight.dtype == torch.float32


def entering(layer: DeployedInt8) -> tuple[bool, bool]:
    return layer.shift is not None, layer.smooth is not None


@pytest.mark.parametrize("family", ["vit", "dinov2", "beit"])
@pytest.mark.parametrize("config", ["hybrid_smooth", "hybrid_shift", "static_smooth"])
def test_the_wide_layer_ends_in_shifted_and_smoothed_codes(
    family: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deployed(family, QUANTIZATIONS[config])
    smooth = config.endswith("smooth")
    assert all(entering(block.mlp.fc2) == (True, smooth) for block in model.blocks)
    report = fuse_blocks(model)
    assert report.lines() == [
        "2 of 2 blocks fused",
        "quantized apart: input of attn.proj in blocks.0, blocks.1: attention ends in floating point",
    ]
    ended: list[dict[str, Any]] = []
    quant, quantize = linear.linear_quant, quantization.quantize
    monkeypatch.setattr(linear, "linear_quant", lambda *x, **options: ended.append(options) or quant(*x, **options))
    apart: list[tuple[Any, ...]] = []
    monkeypatch.setattr(quantization, "quantize", lambda *x: apart.append(x) or quantize(*x))
    with torch.no_grad():
        model(images())
    assert len(ended) == 2
    for options, block in zip(ended, model.blocks, strict=True):
        fc2 = block.mlp.fc2
        assert options["shift_N"] is fc2.shift
        assert options["smooth_N"] is fc2.smooth
        assert options["reciprocal_N"] is block.mlp_output.reciprocal
        assert not smooth or options["reciprocal_N"].equal(1 / fc2.smooth)
    # The projection behind attention: one call for both vectors and the codes.
    proj = [x for x in apart if x[2] is not None and any(x[2] is b.attn.proj.input_scale for b in model.blocks)]
    assert [x[3] is block.attn.proj.shift for x, block in zip(proj, model.blocks, strict=True)] == [True, True]


def test_what_is_quantized_apart_is_said() -> None:
    def why(family: str, config: str) -> dict[str, str]:
        return fuse_blocks(deployed(family, QUANTIZATIONS[config])).passes["blocks.1"]

    assert "whole row" in why("vit", "int8")["mlp.fc2"]
    assert "groups" not in why("vit", "hybrid").get("mlp.fc2", "")
    assert why("siglip", "integer_attention_static_plain") == {}
    assert "no shift, no smooth" in why("vit", "integer_attention_static")["attn.proj"]
    assert "under a given scale only" in why("vit", "integer_attention")["attn.proj"]
    assert why("eva02_split_qkv", "hybrid_plain") == {"attn.proj": "attention ends in floating point"}
    assert why("dinov2_giant", "hybrid")["mlp.fc2"] == "a gate multiplies what enters it"
    assert why("quick_gelu", "hybrid")["mlp.fc2"] == "no product ends in this activation"
    assert why("gated_attention", "hybrid")["attn.proj"] == "a gate multiplies what attention gives"
    assert why("inner_norms", "hybrid") == {}  # norms end in codes
    whole = why("vit", "int8_per_tensor")
    assert list(whole) == ["attn.qkv", "mlp.fc1", "attn.proj", "mlp.fc2"]
    assert "whole tensor" in whole["attn.qkv"]


def test_layers_that_want_the_same_codes_share_them() -> None:
    model = deployed("eva02_split_qkv", QUANTIZATIONS["int8"])
    fuse_blocks(model)
    assert model.blocks[0].attn_input.which == [0, 0, 0]
    assert len(model.blocks[0].attn_input.made) == 1
    model = deployed("eva02_split_qkv", QUANTIZATIONS["static"])
    model.blocks[0].attn.k_proj.smooth.mul_(2)
    with torch.no_grad():
        wanted = model(images())
        fuse_blocks(model)
        assert model(images()).equal(wanted)
    assert model.blocks[0].attn_input.which == [0, 1, 0]


def left(model: nn.Module) -> list[str]:
    report = fuse_blocks(model)
    return [report.count(), *report.reasons()]


def test_reasons_why_not() -> None:
    kept = deployed("vit", Int8Config(keep=("patch_embed", "head", "blocks.1.mlp.fc2")))
    assert left(kept) == ["1 of 2 blocks fused", "not fused: blocks.1: mlp.fc2 is kept in floating point"]
    assert left(plain("vit")) == [
        "0 of 2 blocks fused",
        "not fused: blocks.0, blocks.1: attn.qkv is kept in floating point",
    ]
    trained = plain("vit")
    Int8Config().apply(trained, compute_dtype=torch.float32)
    assert "attn.qkv still has its float weight: finalize the quantization first" in left(trained)[1]
    four = plain("vit")
    Int4Config(type="int", lora=None).apply(four, compute_dtype=torch.float32)
    Int4Config(type="int", lora=None).finalize(four)
    assert "attn.qkv has integer weights only: its inputs are not quantized" in left(four)[1]
    hooked = deployed("vit", QUANTIZATIONS["int8"])
    hooked.blocks[0].attn.register_forward_hook(lambda *_: None)
    assert "its parts have forward hooks" in left(hooked)[1]
    assert left(hooked)[0] == "1 of 2 blocks fused"


SHAPES = {
    "ResPostBlock": ({"block_fn": ResPostBlock}, "not a block of a pre-normed attention and a pre-normed MLP"),
    "ParallelThingsBlock": ({"block_fn": ParallelThingsBlock}, "not a block of a pre-normed attention"),
    "differential": ({"attn_layer": "diff", "num_heads": 2}, "its attention is a DiffAttention"),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_another_shape_stay_and_work(shape: str) -> None:
    config = Int8Config()
    kwargs, reason = SHAPES[shape]
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "patch_size": 8, **kwargs}).eval()
    swap_attention(model, SdpaConfig().build())
    config.apply(model, compute_dtype=torch.float32)
    config.finalize(model)
    with torch.no_grad():
        wanted = model(images())
        lines = left(model)
        assert lines[0] == "0 of 2 blocks fused"
        assert lines[1].startswith("not fused: blocks.0, blocks.1: ")
        assert reason in lines[1]
        assert model(images()).equal(wanted)


def test_training_is_refused() -> None:
    model = deployed("vit", QUANTIZATIONS["int8"])
    fuse_blocks(model)
    model.train()
    with pytest.raises(UserError, match="no training form"):
        model(images())
    model.eval()(images())


HANDED = {  # queries and keys, values, and whether attention ends in codes
    "integer_attention": (torch.int8, torch.int8, False),
    "integer_attention_static_plain": (torch.int8, torch.int8, True),
    "integer_attention_float_values": (torch.int8, torch.float32, False),
    "integer_attention_fp8_values": (torch.int8, torch.float32, False),
    "integer_attention_blocks": (torch.float32, torch.float32, False),
    "integer_attention_blocks_static_plain": (torch.float32, torch.float32, True),
    "integer_attention_float_values_static_plain": (torch.int8, torch.float32, True),
}


@pytest.mark.parametrize("family", ["vit", "siglip", "eva02_split_qkv", "split_qkv_without_rope", "qk_norm"])
@pytest.mark.parametrize("config", HANDED)
def test_integer_attention_is_handed_codes(family: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "split_qkv_without_rope":
        model = deployed("eva02_split_qkv", QUANTIZATIONS[config], use_rot_pos_emb=False)
    else:
        model = deployed(family, QUANTIZATIONS[config])
    with torch.no_grad():
        wanted = model(images())
    fuse_blocks(model)
    pad_tokens(model, 8)
    handed: list[tuple[Any, ...]] = []
    attend = Int8Attend.attend_direct

    def watch(self: Int8Attend, operands: list[Tensor], rows: list[Tensor | None], **options: Any) -> Tensor:
        q, k, v = operands
        assert q.dtype == k.dtype
        handed.append((q.dtype, v.dtype, options["out_scale"] is not None))
        return attend(self, operands, rows, **options)

    monkeypatch.setattr(Int8Attend, "attend_direct", watch)
    with torch.no_grad():
        found = model(images())
    # Rotations and norms of queries and keys lie between projection and attention: no codes there.
    between = family in ("eva02_split_qkv", "qk_norm")
    assert handed == ([] if between else [HANDED[config]] * 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_masks_reach_the_attention() -> None:
    model = deployed("vit", QUANTIZATIONS["int8"])
    mask = torch.ones(17, 17, dtype=torch.bool)
    mask[:, 12:] = False
    with torch.no_grad():
        wanted, unmasked = model(images(), attn_mask=mask), model(images())
        fuse_blocks(model)
        assert model(images(), attn_mask=mask).equal(wanted)
    assert not wanted.equal(unmasked)


@pytest.mark.parametrize("family", ["vit", "dinov3", "siglip", "beit"])
def test_padded_tokens(family: str) -> None:
    model = deployed(family, QUANTIZATIONS["int8"])
    with torch.no_grad():
        unpadded = model(images())
        pad_tokens(model, 32)
        wanted = model(images())
        assert fuse_blocks(model).count() == "2 of 2 blocks fused"
        lengths: list[int] = []
        model.blocks[1].register_forward_pre_hook(lambda block, x: lengths.append(x[0].shape[1]))
        assert model(images()).equal(wanted)
        assert lengths == [32]
    torch.testing.assert_close(wanted, unpadded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ["int8", "hybrid", "fp8", "fp8_hybrid"])
def test_half_precision_is_close(config: str) -> None:
    """Fewer roundings to 16 bits on the way: not the same bits, and no further from full precision."""
    model = deployed("dinov3", QUANTIZATIONS[config])
    with torch.no_grad():
        exact = model(images(64))
        half = copy.deepcopy(model).to(torch.bfloat16)
        unfused = half(images(64).bfloat16()).float()
        fuse_blocks(half)
        at_once = half(images(64).bfloat16()).float()
    assert half.blocks[0].attn.proj.weight_scale.dtype == torch.float32
    assert (at_once - exact).norm() < 1.2 * (unfused - exact).norm()
    assert (at_once - exact).norm() < 0.05 * exact.norm()


def test_under_autocast() -> None:
    model = deployed("vit", QUANTIZATIONS["hybrid"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(images())
        fuse_blocks(model)
        found = model(images())
    assert found.dtype == wanted.dtype
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("make", [copy.deepcopy, pickled])
def test_copies_are_independent(make: Callable[[nn.Module], nn.Module]) -> None:
    model = deployed("dinov2", QUANTIZATIONS["int8"])
    fuse_blocks(model)
    with torch.no_grad():
        wanted = model(images())
        copied = make(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
        assert copied(images()).equal(wanted)
        unfuse_blocks(copied)
        assert copied(images()).equal(wanted)


@pytest.mark.parametrize("family", ["vit", "dinov3", "eva02_split_qkv"])
def test_export_round_trip(family: str) -> None:
    model = deployed(family, QUANTIZATIONS["hybrid"])
    fuse_blocks(model)
    with torch.no_grad():
        exported = torch.export.export(model, (images(),))
        assert exported.module()(images()).equal(model(images()))


@pytest.mark.slow
def test_compiles_whole() -> None:
    model = deployed("vit", QUANTIZATIONS["hybrid"])
    fuse_blocks(model)
    with torch.no_grad():
        wanted = model(images())
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images()), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["vit", "dinov3", "eva02_split_qkv", "siglip", "gated_attention"])
@pytest.mark.parametrize(
    "config",
    [
        "int8",
        "smooth",
        "hybrid",
        "hybrid_plain",
        "hybrid_smooth",
        "hybrid_shift",
        "static",
        "static_smooth",
        "integer_attention_static",
        "integer_attention_static_plain",
        "integer_attention_float_values",
        "integer_attention_float_values_static_plain",
        "integer_attention_blocks",
        "fp8",
        "fp8_hybrid",
        "fp8_shift",
    ],
)
def test_a_gpu_makes_the_codes_of_the_definition(family: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block on the same input: a whole run of two sound programs drifts apart, one rounding at a time."""
    if config.startswith("fp8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 units")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    chosen = QUANTIZATIONS[config]
    if family == "siglip" and config.startswith("static"):  # its pooling's query is the same for every image
        chosen = chosen.model_copy(update={"keep": [*chosen.keep, "attn_pool.q"]})
    model = deployed(family, chosen)
    fuse_blocks(model)
    on_gpu = copy.deepcopy(model).cuda()
    given: list[Tensor] = []
    model.blocks[1].attn_input.register_forward_pre_hook(lambda module, x: given.append(x[0]))
    with torch.no_grad():
        wanted, found = model(images(64)), on_gpu(images(64).cuda()).cpu()
        here, there = model.blocks[1].attn_input(given[0]), on_gpu.blocks[1].attn_input(given[0].cuda())
        if family == "vit":  # what enters the last projection and the narrow layer, each made of the same input
            y = torch.randn(64, 17, 48)
            here.append(model.blocks[1].attn_output(y))
            there.append(on_gpu.blocks[1].attn_output(y.cuda()))
            wide = [block.views["mlp.fc1"] for block in (model.blocks[1], on_gpu.blocks[1])]
            narrow = [block.views["mlp.fc2"] for block in (model.blocks[1], on_gpu.blocks[1])]
            codes = model.blocks[1].mlp_input(y)[0]
            here.append(wide[0].output_gelu_codes(codes, narrow[0], torch.float32))
            codes = Codes(codes.values.cuda(), codes.scale.cuda())
            there.append(wide[1].output_gelu_codes(codes, narrow[1], torch.float32))
        drift = (model(images(64) * (1 + 2**-23)) - wanted).norm()  # the smallest change, on the same machine
    fp8 = config.startswith("fp8")
    for one, other in zip(here, there, strict=True):
        equal = one.values.float() == other.values.cpu().float()
        assert equal.float().mean() >= (0.97 if fp8 else 0.9999)  # fp8 units sum in about 14 bits
        rtol = 1e-3 if fp8 else 1e-5
        torch.testing.assert_close(one.scale.expand_as(other.scale), other.scale.cpu(), rtol=rtol, atol=0)
    assert (found - wanted).norm() < max((1e-1 if fp8 else 1e-2) * wanted.norm(), 3 * drift)
