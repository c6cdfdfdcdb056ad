"""Whole models in fp8: what is trained is what is deployed."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError
from vit_efficient.kernels.fp8_linear.reference import Scheme
from vit_efficient.machine import Gpu, Machine
from vit_efficient.quantization.deploy import deployed_state, load_deployed, total_bytes
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.fp8_layers import DeployedFp8, Fp8Linear, Fp8Patches
from vit_efficient.quantization.select import find_layers

CONFIGS = {
    "default": Fp8Config(),
    "all layers": Fp8Config(keep=()),
    "per tensor": Fp8Config(keep=(), weights="tensor", activations="tensor"),
    "fast": Fp8Config(accumulation="fast"),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def make(config: Fp8Config | None = None, **kwargs: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **(sizes | kwargs))
    swap_attention(model, SdpaConfig().build())
    if config is not None:
        config.apply(model, compute_dtype=torch.float32)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_training_logits_equal_deployed_logits_bit_for_bit(name: str, tmp_path: Path) -> None:
    """By finalizing in place, and by a file loaded into a fresh model."""
    model = make(CONFIGS[name])
    with torch.no_grad():
        trained = model.train()(IMAGES)
    tensors, metadata = deployed_state(model)
    save_file(tensors, tmp_path / "m.safetensors")
    CONFIGS[name].finalize(model)
    fresh = make()
    load_deployed(fresh, load_file(tmp_path / "m.safetensors"), metadata)
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES), trained)
        assert torch.equal(fresh.eval()(IMAGES), trained)
    layers = [m for m in fresh.modules() if isinstance(m, DeployedFp8)]
    assert len(layers) == (10 if CONFIGS[name].keep == () else 8)
    assert all(m.weight.dtype == torch.float8_e4m3fn for m in layers)
    assert {m.scheme for m in layers} == {Scheme.of(CONFIGS[name])}
    assert not any(isinstance(m, (Fp8Linear, Fp8Patches)) for m in model.modules())
    again, described = deployed_state(fresh)
    assert described == metadata
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_half_precision_files_give_the_logits_of_the_run() -> None:
    model, fresh = make(Fp8Config()), make()
    load_deployed(fresh, *deployed_state(model, torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh.eval()(IMAGES), model.eval()(IMAGES))


def test_near_the_float_model() -> None:
    with torch.no_grad():
        plain = make().eval()(IMAGES)
        for config in CONFIGS.values():
            error = (make(config).eval()(IMAGES) - plain).norm() / plain.norm()
            assert 0.005 < error < 0.15


def test_weighs_a_quarter_and_its_scales() -> None:
    tensors, _ = deployed_state(make(Fp8Config()))
    weights, scales = 2 * 12 * 192**2, 4 * 2 * (3 + 1 + 4 + 1) * 192
    floats = sum(4 * p.numel() for n, p in make().named_parameters() if not (n.startswith("blocks") and p.ndim == 2))
    assert total_bytes(tensors) == weights + scales + floats


def test_names_and_roles_do_not_change() -> None:
    plain, quantized = make(), make(Fp8Config())
    assert list(plain.state_dict()) == list(quantized.state_dict())
    roles = [(layer.name, layer.role) for layer in find_layers(plain)]
    assert [(layer.name, layer.role) for layer in find_layers(quantized)] == roles
    Fp8Config().finalize(quantized)
    assert [(layer.name, layer.role) for layer in find_layers(quantized)] == roles


def test_gradients_reach_every_weight() -> None:
    model = make(Fp8Config(keep=()))
    model(IMAGES).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_codes_and_scales_survive_a_cast() -> None:
    model = make(Fp8Config())
    Fp8Config().finalize(model)
    layer = model.blocks[0].attn.qkv
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert set(before) == {"weight", "weight_scale", "bias"}
    model.to(torch.bfloat16)
    assert model.norm.weight.dtype == torch.bfloat16
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


def test_damaged_files_are_refused() -> None:
    tensors, metadata = deployed_state(make(Fp8Config()))
    name = "blocks.0.attn.qkv.weight"
    for wrong in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {name: tensors[name].float()},
        tensors | {f"{name}_scale": torch.ones(1)},
        tensors | {name: tensors[name][:-1]},
    ):
        with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv"):
            load_deployed(make(), wrong, metadata)
    with pytest.raises(CheckpointError):
        load_deployed(make(embed_dim=96), tensors, metadata)


@pytest.mark.parametrize(
    ("gpu", "device", "refused"),
    [
        (Gpu("A100", (8, 0), 80 << 30), "cuda", "sm_80"),
        (Gpu("T4", (7, 5), 16 << 30), "cuda", "sm_75"),
        (Gpu("L4", (8, 9), 24 << 30), "cuda", None),
        (Gpu("H100", (9, 0), 80 << 30), "cuda", None),
        (Gpu("A100", (8, 0), 80 << 30), "cpu", None),
    ],
)
def test_refusal(gpu: Gpu, device: str, refused: str | None) -> None:
    text = Fp8Config().refusal(Machine((gpu,)), "fp32" if device == "cpu" else "fp16", device)
    if refused is None:
        assert text is None
    else:
        assert text is not None
        assert text.startswith("quantization=fp8: ")
        assert refused in text
        assert "quantization=int8" in text


def test_refusal_names_the_oldest_of_several() -> None:
    machine = Machine((Gpu("H100", (9, 0), 80 << 30), Gpu("A100", (8, 0), 80 << 30)))
    assert "A100" in (Fp8Config().refusal(machine, "bf16", "cuda") or "")
