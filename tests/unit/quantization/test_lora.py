"""DoRA and rsLoRA in training and in files, and what `train` unfreezes besides adapters."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.bnb_int8 import BnbInt8Config
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.lora import adapter_state, load_trainable_state, trainable_state
from vit_efficient.quantization.none import NoneConfig
from vit_efficient.quantization.stored import ADAPTERS

Config = Int4Config | NoneConfig | BnbInt8Config
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
KINDS = {
    "dora": LoraConfig(rank=4, dora=True),
    "rslora": LoraConfig(rank=4, rslora=True),
    "both": LoraConfig(rank=4, dora=True, rslora=True),
}
BASES: dict[str, type[Config]] = {"float": NoneConfig, "nf4": Int4Config, "int8": BnbInt8Config}


def make(config: Config | None, depth: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=depth, num_classes=10)
    torch.manual_seed(seed)
    if config is not None:
        config.apply(model, compute_dtype=dtype)
    return model


def trained_a_little(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_new_adapters_change_nothing_and_learn(kind: str, base: str) -> None:
    without = make(BASES[base](lora=None)).eval()
    model = make(BASES[base](lora=KINDS[kind]))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IMAGES), without(IMAGES), rtol=1e-5, atol=1e-5)
    model.train()(IMAGES).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    lengths = [name for name in adapter_state(model) if "magnitude" in name]
    assert len(lengths) == (8 if KINDS[kind].dora else 0)


def test_scale_of_rslora() -> None:
    config = LoraConfig(rank=16, alpha=8)
    for rslora, scale in ((False, 8 / 16), (True, 8 / math.sqrt(16))):
        model = make(NoneConfig(lora=config.model_copy(update={"rslora": rslora})))
        assert model.blocks[0].attn.qkv.scaling["default"] == scale


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_loaded_afresh_gives_the_same_logits(kind: str, base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained_a_little(make(BASES[base](lora=KINDS[kind]), dtype=dtype)).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = model(IMAGES)
        tensors, metadata = deployed_state(model, dtype)
        save_file(tensors, tmp_path / "m.safetensors")
        fresh = make(None)
        load_deployed(fresh, load_file(tmp_path / "m.safetensors"), metadata)
        got = fresh.eval()(IMAGES)
    assert torch.equal(got, expected) if dtype == torch.float32 else torch.allclose(got, expected, rtol=0, atol=0.02)
    stored = set(ADAPTERS.validate_json(metadata["adapters"]).values())
    assert {(s.rank, s.dora, s.rslora) for s in stored} == {(4, KINDS[kind].dora, KINDS[kind].rslora)}


def test_files_with_adapters_of_several_kinds_are_refused() -> None:
    tensors, metadata = deployed_state(make(NoneConfig(lora=KINDS["dora"])))
    adapters = ADAPTERS.validate_json(metadata["adapters"])
    name = next(iter(adapters))
    adapters[name] = adapters[name].model_copy(update={"dora": False})
    with pytest.raises(CheckpointError, match="of different kinds"):
        load_deployed(make(None), tensors, metadata | {"adapters": ADAPTERS.dump_json(adapters).decode()})
    plain = {key: stored.model_copy(update={"dora": False}) for key, stored in adapters.items()}
    with pytest.raises(CheckpointError, match="lora_magnitude_vector"):  # a file that denies what it holds
        load_deployed(make(None), tensors, metadata | {"adapters": ADAPTERS.dump_json(plain).decode()})


def whole(model: nn.Module) -> set[str]:
    """Modules with trained parameters that are not adapters'."""
    return {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}


@pytest.mark.parametrize("base", BASES)
def test_critical_layers_are_trained_whole_in_full_precision(base: str) -> None:
    config = BASES[base](lora=LoraConfig(), train="critical")
    model = make(config, depth=3, dtype=torch.bfloat16)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    norms = {"norm", *(f"blocks.{i}.{norm}" for i in range(3) for norm in ("norm1", "norm2"))}
    ends = {f"blocks.{i}.{layer}" for i in (0, 2) for layer in layers}
    assert whole(model) == {"patch_embed.proj", "head", *norms, *ends}
    for name in whole(model):
        module = model.get_submodule(name)
        assert type(module) in (nn.Linear, nn.Conv2d, nn.LayerNorm) or "Norm" in type(module).__name__
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    adapted = {name.split(".lora_")[0] for name in adapter_state(model)}
    assert adapted == {f"blocks.1.{layer}" for layer in layers}


def test_report_says_what_is_trained() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=10)
    report = Int4Config(train="critical", critical=("first_block", "norms")).apply(model, compute_dtype=torch.float32)
    text = "\n".join(report.lines())
    assert "int4: 8 of 14 layers" in text
    assert "kept patch_embed (patch_embed.proj), first_block (blocks.0.attn.qkv" in text
    assert "trained whole, in full precision: first_block (blocks.0.attn.qkv" in text
    assert "norms (blocks.0.norm1, blocks.0.norm2, blocks.1.norm1 and 4 more)" in text
    assert "adapters on 8 layers" in text
    assert whole(model) >= {"head", "norm"}  # the head by lora.train_head


def test_all_trains_what_is_in_floating_point() -> None:
    model = make(Int4Config(train="all"), dtype=torch.bfloat16)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("base_layer" in name for name in frozen)  # 4-bit weights and their biases
    assert {"", "patch_embed.proj", "head", "norm", "blocks.0.norm1"} <= whole(model)
    model = make(NoneConfig(lora=LoraConfig(), train="all"), dtype=torch.bfloat16)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("train", ["critical", "all"])
def test_checkpoint_state_of_more_than_adapters(train: str) -> None:
    config = Int4Config(
        train=train, critical=("first_block", "norms") if train == "critical" else Int4Config().critical
    )  # type: ignore[arg-type]
    model = trained_a_little(make(config))
    state = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    again = make(config, seed=2)
    load_trainable_state(again, state)
    with torch.no_grad():
        assert torch.equal(again.eval()(IMAGES), model.eval()(IMAGES))
    tensors, metadata = deployed_state(model)
    fresh = make(None)
    load_deployed(fresh, tensors, metadata)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(IMAGES), model(IMAGES))


def test_mistakes_are_named() -> None:
    for config, text in [
        (Int4Config(train="critical", critical=("blocks.9.*",)), r"quantization\.critical: 'blocks\.9\.\*' matches no"),
        (NoneConfig(lora=LoraConfig(), train="critical", critical=("blocks",)), "names every layer that"),
        (NoneConfig(lora=LoraConfig(), train="critical"), "names every layer that"),  # two blocks: the first and last
    ]:
        with pytest.raises(UserError, match=text):
            make(config)
    with pytest.raises(UserError, match="last_block, norms"):
        make(Int4Config(train="critical", critical=("nrms",)))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"train": "all"}, "is for adapters, and quantization.lora is unset"),
        ({"lora": LoraConfig(), "critical": ("head",)}, "is for quantization.train=critical, and that is lora"),
        ({"lora": LoraConfig(), "train": "critical", "critical": ()}, "names no layer"),
        ({"lora": LoraConfig(), "train": "some"}, "'lora', 'critical' or 'all'"),
    ],
)
def test_recipes_that_make_no_sense(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        NoneConfig(**values)  # type: ignore[arg-type]
