"""torchao's schemes on the selected layers: near the float model, saved as plain tensors, loaded bit for bit."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CapabilityError, CheckpointError, UserError
from vit_efficient.machine import Gpu, Machine
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.select import find_layers
from vit_efficient.quantization.stored import StoredTorchao
from vit_efficient.quantization.torchao import TorchaoConfig

pytest.importorskip("torchao")
from vit_efficient.quantization.torchao_layers import TorchaoLinear

# The configuration, and what the layer's output differs by from the float layer's, at least and at most.
CONFIGS: dict[str, tuple[TorchaoConfig, float, float]] = {
    "w8": (TorchaoConfig(scheme="int8_weight_only"), 0.003, 0.012),
    "w8a8": (TorchaoConfig(scheme="int8_dynamic_activation_int8_weight"), 0.005, 0.015),
    "w4": (TorchaoConfig(scheme="intx_weight_only"), 0.05, 0.15),
    "w3, rows": (TorchaoConfig(scheme="intx_weight_only", bits=3, group=None), 0.1, 0.25),
    "w4a8": (TorchaoConfig(scheme="int8_dynamic_activation_intx_weight", group=32), 0.05, 0.15),
    "fp8": (TorchaoConfig(scheme="float8_weight_only"), 0.015, 0.04),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def make(config: TorchaoConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    swap_attention(model, SdpaConfig().build())
    if config is not None:
        config.apply(model, compute_dtype=torch.float32)
    return model


def layer_of(config: TorchaoConfig, plain: nn.Linear) -> TorchaoLinear:
    options: dict[str, Any] = {"bits": config.bits, "group": config.group} if "intx" in config.scheme else {}
    described = StoredTorchao(shape=tuple(plain.weight.shape), scheme=config.scheme, **options)
    return TorchaoLinear.of(plain, described)


def error(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_as_near_as_its_bits_allow(name: str) -> None:
    config, least, most = CONFIGS[name]
    torch.manual_seed(0)
    plain, x = nn.Linear(192, 320), torch.randn(50, 192)
    layer = layer_of(config, plain)
    assert least < error(layer(x), plain(x)) < most
    assert torch.equal(layer(x), layer(x))
    assert layer(torch.randn(0, 7, 192)).shape == (0, 7, 320)
    x[1, 1], x[2, 2] = torch.nan, torch.inf
    y = layer(x)
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_loaded_afresh_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = make(CONFIGS[name][0])
    with torch.no_grad():
        expected = model.train()(IMAGES)
        assert torch.equal(model.eval()(IMAGES), expected)
        tensors, metadata = deployed_state(model)
        assert all(type(tensor) is Tensor for tensor in tensors.values())
        save_file(tensors, tmp_path / "m.safetensors")
        fresh = make()
        load_deployed(fresh, load_file(tmp_path / "m.safetensors"), metadata)
        assert torch.equal(fresh.eval()(IMAGES), expected)
    again, described = deployed_state(fresh)
    assert described == metadata
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_only_the_selected_layers_and_nothing_is_trained() -> None:
    model = make(TorchaoConfig(keep=("head", "patch_embed", "first_block", "*.mlp.fc2")))
    assert {n for n, m in model.named_modules() if isinstance(m, TorchaoLinear)} == {
        "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1",
    }  # fmt: skip
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    assert not any(p.requires_grad for p in model.parameters())
    roles = [(layer.name, layer.role) for layer in find_layers(make())]
    assert [(layer.name, layer.role) for layer in find_layers(model)] == roles


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision(name: str) -> None:
    """Under autocast, and of a model that was cast: halves in and out, on the same codes and scales."""
    plain, x = nn.Linear(192, 320), torch.randn(50, 192)
    layer = layer_of(CONFIGS[name][0], plain)
    wanted, before = layer(x), {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        under = layer(x)
    layer.to(torch.bfloat16)
    for y in (under, layer(x.to(torch.bfloat16))):
        assert y.dtype == torch.bfloat16
        assert error(y.float(), wanted) < 0.015
    for key, tensor in layer.state_dict().items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_into_an_empty_layer(name: str) -> None:
    layer, x = layer_of(CONFIGS[name][0], nn.Linear(192, 320)), torch.randn(5, 192)
    empty = TorchaoLinear.empty(layer.describe(), bias=True)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    twin = copy.deepcopy(empty)
    empty.load_state_dict(layer_of(CONFIGS[name][0], nn.Linear(192, 320)).state_dict())
    assert not torch.equal(empty(x), layer(x))
    assert torch.equal(twin(x), layer(x))


def test_states_that_do_not_fit_are_named() -> None:
    layer = layer_of(CONFIGS["w8"][0], nn.Linear(192, 320))
    state = layer.state_dict()
    for wrong, text in [
        ({}, "Missing key"),
        (nn.Linear(192, 320).state_dict(), r"weight\.qdata"),
        (state | {"weight.qdata": state["weight.qdata"].float()}, "torch.int8"),  # never cut to integers in silence
        (state | {"weight.qdata": state["weight.qdata"][:1]}, r"\(320, 192\)"),  # never broadcast
        (state | {"weight.stranger": torch.ones(1)}, "Unexpected key"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(wrong)


def test_damaged_files_are_refused() -> None:
    tensors, metadata = deployed_state(make(CONFIGS["w4"][0]))
    name = "blocks.0.attn.qkv"
    for wrong, described in [
        ({key: value for key, value in tensors.items() if key != f"{name}.weight.scale"}, metadata),
        (tensors | {f"{name}.weight.qdata": tensors[f"{name}.weight.qdata"].float()}, metadata),
        (tensors, metadata | {"layers": metadata["layers"].replace('"group":64', '"group":32')}),
        (tensors, metadata | {"layers": metadata["layers"].replace("[576,192]", "[1048576,1048576]")}),
    ]:
        with pytest.raises(CheckpointError, match=name):
            load_deployed(make(), wrong, described)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_deployed(make(), tensors, metadata | {"layers": metadata["layers"].replace("intx_weight_only", "load")})


def test_what_cannot_be_quantized_is_said_and_nothing_is_changed() -> None:
    with pytest.raises(UserError, match="patch_embed"):
        make(TorchaoConfig(keep=("head",)))
    model = make()
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv: quantization\.group=80 does not divide the 192"):
        TorchaoConfig(scheme="intx_weight_only", group=80).apply(model, compute_dtype=torch.float32)
    assert not any(isinstance(m, TorchaoLinear) for m in model.modules())
    if not torch.cuda.is_available():
        with pytest.raises(CapabilityError, match="quantization=fp8"):
            make(TorchaoConfig(scheme="float8_dynamic_activation_float8_weight"))


@pytest.mark.parametrize("options", [{"bits": 3}, {"group": 32}, {"group": None}])
def test_options_of_another_scheme_are_mistakes(options: dict[str, Any]) -> None:
    TorchaoConfig(scheme="intx_weight_only", **options)
    with pytest.raises(ValidationError, match="intx schemes"):
        TorchaoConfig(scheme="int8_weight_only", **options)


OLD_CPU = """
import torch
from vit_efficient.errors import CapabilityError
from vit_efficient.quantization.stored import StoredTorchao
from vit_efficient.quantization.torchao_layers import TorchaoLinear
for scheme in ("int8_weight_only", "int8_dynamic_activation_int8_weight"):
    layer = TorchaoLinear.of(torch.nn.Linear(768, 48), StoredTorchao(shape=(48, 768), scheme=scheme))
    try:
        layer(torch.randn(65, 768))
        print("ran")
    except CapabilityError as error:
        print("refused" if "VNNI" in str(error) else error)
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="needs a processor with AVX-512",
)
def test_processors_whose_product_overflows_are_refused() -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OLD_CPU], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ran", "refused"]


HERE = {"torchao": "0.18.0"}
T4, V100, H100 = (
    Machine((Gpu(name, capability, 16 << 30),), packages=HERE)
    for name, capability in (("T4", (7, 5)), ("V100", (7, 0)), ("H100", (9, 0)))
)


@pytest.mark.parametrize(
    ("scheme", "machine", "device", "reason"),
    [
        ("int8_weight_only", Machine(), "cpu", "pip install torchao"),
        ("float8_dynamic_activation_float8_weight", Machine(packages=HERE), "cpu", "quantization=fp8"),
        ("float8_dynamic_activation_float8_weight", T4, "cuda", "sm_75"),
        ("int8_dynamic_activation_int8_weight", V100, "cuda", "sm_70"),
        ("float8_dynamic_activation_float8_weight", H100, "cuda", None),
        ("int8_dynamic_activation_int8_weight", T4, "cuda", None),
        ("float8_weight_only", V100, "cuda", None),
        ("int8_dynamic_activation_int8_weight", Machine(packages=HERE), "cpu", None),
    ],
)
def test_refusal(scheme: Any, machine: Machine, device: str, reason: str | None) -> None:
    text = TorchaoConfig(scheme=scheme).refusal(machine, "fp32" if device == "cpu" else "fp16", device)
    assert (text is None) == (reason is None)
    if reason is not None:
        assert text is not None
        assert text.startswith("quantization")
        assert reason in text


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CONFIGS, "fp8a8"])
def test_gpu_is_near_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(192, 320), torch.randn(50, 192)
    if name == "fp8a8":
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs fp8 matrix units (sm_89)")
        config, wanted, most = TorchaoConfig(scheme="float8_dynamic_activation_float8_weight"), plain(x), 0.06
        layer = layer_of(config, plain)
    else:
        layer = layer_of(CONFIGS[name][0], plain)
        wanted, most = layer(x), 0.015
    before = layer.state_dict()
    layer.cuda()
    assert all(torch.equal(tensor.cpu(), before[key]) for key, tensor in layer.state_dict().items())
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x.cuda())
    assert y.dtype == torch.bfloat16
    assert error(y.float().cpu(), wanted) < most
