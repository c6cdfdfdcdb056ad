"""The deployed file: what it weighs in half precision, and files that are damaged or from a stranger."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from vit_efficient.errors import CheckpointError
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.deploy import deployed_state, load_deployed, total_bytes
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.none import NoneConfig

CONFIGS = {
    "none": NoneConfig(),
    "lora": NoneConfig(lora=LoraConfig()),
    "int8": Int8Config(),
    "int8, all": Int8Config(keep=()),
    "int4": Int4Config(),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def make(name: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    if name:
        CONFIGS[name].apply(model, compute_dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.02 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_files_give_the_logits_of_the_run(name: str) -> None:
    """Autocast rounds the same weights to the same halves, so nothing is lost, and the float layers weigh half."""
    model, fresh = make(name, torch.bfloat16), make()
    tensors, metadata = deployed_state(model, torch.bfloat16)
    load_deployed(fresh, tensors, metadata)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh.eval()(IMAGES), model(IMAGES))
    if name == "none":
        assert total_bytes(tensors) < 0.51 * total_bytes(deployed_state(model)[0])


def test_deployed_state_of_a_deployed_model_is_the_same() -> None:
    model = make("int8, all")
    before, described = deployed_state(model)
    before = {key: tensor.clone() for key, tensor in before.items()}
    CONFIGS["int8, all"].finalize(model)
    after, again = deployed_state(model)
    assert described == again
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_int8_weighs_a_quarter_and_its_scales() -> None:
    tensors, _ = deployed_state(make("int8"))
    weights = 2 * 12 * 192**2
    scales = 4 * 2 * (3 + 1 + 4 + 1) * 192
    floats = sum(4 * p.numel() for n, p in make().named_parameters() if not (n.startswith("blocks") and p.ndim == 2))
    assert total_bytes(tensors) == weights + scales + floats


def changed(metadata: dict[str, str], **layer: object) -> dict[str, str]:
    layers = json.loads(metadata["layers"])
    layers["blocks.0.attn.qkv"] |= layer
    return metadata | {"layers": json.dumps(layers)}


def test_damaged_descriptions_are_refused() -> None:
    tensors, metadata = deployed_state(make("int8"))
    for wrong, text in [
        ({}, "format"),
        (metadata | {"version": "999"}, "version '999'"),
        (metadata | {"layers": "{"}, "cannot be read"),
        (changed(metadata, kind="int3"), "cannot be read"),
        (changed(metadata, compute_dtype="load"), "cannot be read"),  # never an attribute of torch by a name of theirs
        (changed(metadata, shape=[1 << 20, 1 << 20]), "not what the file says"),  # before any memory is taken
        (changed(metadata, kind="nf4"), "cannot be read"),
        (metadata | {"layers": "{}"}, "another model"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            load_deployed(make(), tensors, wrong)


def test_damaged_tensors_are_refused() -> None:
    tensors, metadata = deployed_state(make("int8"))
    name = "blocks.0.attn.qkv.weight"
    layer = "blocks.0.attn.qkv"
    for wrong, text in [
        ({key: value for key, value in tensors.items() if key != name}, layer),
        ({key: value for key, value in tensors.items() if key != f"{name}_scale"}, "it lacks"),
        (tensors | {name: tensors[name].float()}, layer),  # a float would be cut to integers in silence
        (tensors | {"stranger": torch.zeros(1)}, "stranger"),
        (tensors | {"norm.weight": torch.zeros(3)}, "norm.weight"),
    ]:
        with pytest.raises(CheckpointError, match=text):
            load_deployed(make(), wrong, metadata)
