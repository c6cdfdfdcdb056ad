"""bitsandbytes' LLM.int8 layer as we use it: trains as it evaluates, saved and loaded bit for bit."""

from __future__ import annotations

import copy
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import timm
import torch
from peft.tuners.lora.bnb import Linear8bitLt as Adapted
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.machine import Gpu, Machine
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.bnb_int8 import BnbInt8Config
from vit_efficient.quantization.bnb_int8_layers import FrozenLinear8bit
from vit_efficient.quantization.deploy import deployed_state, load_deployed, total_bytes

CONFIGS = {
    "default": BnbInt8Config(),
    "no outliers": BnbInt8Config(threshold=0),
    "many outliers": BnbInt8Config(threshold=2.0),
    "adapters": BnbInt8Config(lora=LoraConfig(rank=4)),
}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def layer_and_float(threshold: float = 6.0) -> tuple[FrozenLinear8bit, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(192, 320)
    return FrozenLinear8bit.of(plain, threshold=threshold), plain


def with_outliers(rows: int = 50) -> Tensor:
    x = torch.randn(rows, 192, generator=torch.Generator().manual_seed(1))
    x[:, [7, 100]] *= 30
    return x


def make(config: BnbInt8Config | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    swap_attention(model, SdpaConfig().build())
    if config is not None:
        torch.manual_seed(1)
        config.apply(model, compute_dtype=torch.float32)
    return model


def error(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).norm() / wanted.norm()).detach())


def test_codes_by_the_definition() -> None:
    layer, plain = layer_and_float()
    weight = plain.weight.detach().half().float()
    assert torch.equal(layer.SCB, weight.abs().amax(dim=1))
    codes = (weight.double() * 127 / layer.SCB.double().unsqueeze(1)).round()
    assert (layer.weight.data - codes).abs().max() <= 1  # ties, within the rounding of a reciprocal
    assert (layer.weight.data == codes).float().mean() > 0.999
    assert error(layer.dequantized(), plain.weight) < 0.01


def test_the_threshold_spares_outliers() -> None:
    layer, plain = layer_and_float()
    x = with_outliers()
    wanted = plain(x).detach()
    errors = {}
    for threshold in (0.0, 6.0, 1e6):
        layer.state.threshold = threshold
        errors[threshold] = error(layer(x), wanted)
    assert errors[0.0] == errors[1e6] > 4 * errors[6.0]
    assert errors[6.0] < 0.01


def test_outliers_are_multiplied_by_the_dequantized_weight() -> None:
    layer, _ = layer_and_float(threshold=1e-6)  # every input is one
    x = with_outliers()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantized(), layer.bias))


def test_training_computes_what_evaluation_does() -> None:
    """bitsandbytes' own layer trains on a CPU through activations that are not quantized."""
    layer, plain = layer_and_float()
    theirs = bnb.nn.Linear8bitLt(192, 320, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu")
    x = with_outliers()
    evaluated = layer.eval()(x)
    assert torch.equal(evaluated, layer(x))
    assert torch.equal(evaluated, layer.train()(x))
    assert torch.equal(evaluated, theirs.eval()(x))
    assert not torch.equal(evaluated, theirs.train()(x))


def test_gradient_passes_through_and_stops_at_the_weight() -> None:
    layer, _ = layer_and_float()
    x, upstream = with_outliers().requires_grad_(), torch.randn(50, 320)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ layer.dequantized(), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in layer.parameters())


def test_state_dict_into_an_empty_layer() -> None:
    layer, _ = layer_and_float()
    x = with_outliers()
    empty = FrozenLinear8bit.empty((320, 192), True, threshold=6.0)
    assert not torch.equal(empty(x), layer(x))
    state = layer.state_dict()
    assert {key: tensor.dtype for key, tensor in state.items()} == {
        "weight": torch.int8, "SCB": torch.float32, "bias": torch.float32,
    }  # fmt: skip
    empty.load_state_dict(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in empty.state_dict().items())
    assert torch.equal(empty(x), layer(x))
    twin = copy.deepcopy(empty)
    empty.load_state_dict(FrozenLinear8bit.of(nn.Linear(192, 320), threshold=6.0).state_dict())
    assert torch.equal(twin(x), layer(x))


def test_a_float_weight_is_not_cut_to_integers() -> None:
    layer, plain = layer_and_float()
    with pytest.raises(RuntimeError, match="not the int8 codes"):
        layer.load_state_dict(plain.state_dict(), strict=False)


def test_scales_and_bias_survive_a_cast() -> None:
    layer, _ = layer_and_float()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    x = with_outliers().to(torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert layer.bias.dtype == torch.float32  # a forward does not change the state


@pytest.mark.parametrize("outliers", [True, False])
def test_autocast_decides_the_output(outliers: bool) -> None:
    layer, plain = layer_and_float()
    x = with_outliers() if outliers else torch.randn(50, 192)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert error(y.float(), plain(x)) < 0.02


def test_shapes_and_what_is_not_finite() -> None:
    layer, _ = layer_and_float()
    assert layer(torch.randn(2, 3, 4, 192)).shape == (2, 3, 4, 320)
    assert layer(torch.randn(0, 7, 192)).shape == (0, 7, 320)
    x = with_outliers()
    x[3, 3], x[5, 5], x[6] = torch.nan, torch.inf, 0.0
    y = layer(x)
    assert y[3].isnan().all()
    assert not y[5].isfinite().any()
    assert torch.equal(y[6], layer.bias)
    assert y[[0, 1, 2, 4, 7]].isfinite().all()


def test_no_warning_at_every_call(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        layer_and_float()[0](with_outliers())
    assert "float16" not in caplog.text


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_loaded_afresh_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = make(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape)
        trained, expected = model.train()(IMAGES), model.eval()(IMAGES)
        assert torch.equal(trained, expected)
        tensors, metadata = deployed_state(model)
        save_file(tensors, tmp_path / "m.safetensors")
        fresh = make()
        load_deployed(fresh, load_file(tmp_path / "m.safetensors"), metadata)
        assert torch.equal(fresh.eval()(IMAGES), expected)
    assert type(fresh.blocks[0].attn.qkv) is type(model.blocks[0].attn.qkv)


def test_near_the_float_model_and_small() -> None:
    with torch.no_grad():
        wanted = make().eval()(IMAGES)
        assert 0.001 < error(make(CONFIGS["default"]).eval()(IMAGES), wanted) < 0.1
    tensors, _ = deployed_state(make(CONFIGS["default"]))
    weights, scales = 2 * 12 * 192**2, 4 * 2 * (3 + 1 + 4 + 1) * 192
    floats = sum(4 * p.numel() for n, p in make().named_parameters() if not (n.startswith("blocks") and p.ndim == 2))
    assert total_bytes(tensors) == weights + scales + floats


def test_adapters_on_an_int8_base() -> None:
    model = make(CONFIGS["adapters"])
    assert isinstance(model.blocks[0].attn.qkv, Adapted)  # else peft has taken it for a float layer
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == {"head.weight", "head.bias"}
    assert sum("lora_A" in n for n in trained) == 8
    model(IMAGES).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    base = model.blocks[0].attn.qkv.base_layer
    assert torch.equal(dequantize_bnb_weight(base.weight, state=base.state), base.dequantized())


def test_without_adapters_nothing_is_trained() -> None:
    assert not any(p.requires_grad for p in make(CONFIGS["default"]).parameters())


def test_train_critical_keeps_and_trains_those_layers() -> None:
    config = BnbInt8Config(lora=LoraConfig(), train="critical", critical=("first_block", "head", "norms"))
    model = make(config)
    assert isinstance(model.blocks[0].attn.qkv, nn.Linear)
    assert not isinstance(model.blocks[0].attn.qkv, FrozenLinear8bit)
    assert model.blocks[0].attn.qkv.weight.requires_grad
    assert isinstance(model.blocks[1].attn.qkv, Adapted)


def test_a_weight_replaced_without_its_scales_is_noticed() -> None:
    """What peft does when it merges into the layer."""
    layer, plain = layer_and_float()
    layer.weight = bnb.nn.Int8Params(2 * plain.weight.detach(), requires_grad=False, has_fp16_weights=False).to("cpu")
    for use in (lambda: layer(with_outliers()), layer.state_dict, layer.dequantized):
        with pytest.raises(UserError, match="export merge"):
            use()


def test_damaged_files_and_convolutions_are_refused() -> None:
    tensors, metadata = deployed_state(make(CONFIGS["default"]))
    name = "blocks.0.attn.qkv"
    for wrong in (
        {key: value for key, value in tensors.items() if key != f"{name}.SCB"},
        tensors | {f"{name}.weight": tensors[f"{name}.weight"].float()},
        tensors | {f"{name}.SCB": torch.ones(3)},
    ):
        with pytest.raises(CheckpointError, match=name):
            load_deployed(make(), wrong, metadata)
    with pytest.raises(UserError, match="patch_embed"):
        make(BnbInt8Config(keep=("head",)))


OLD_CPU = """
import torch
from vit_efficient.errors import CapabilityError
from vit_efficient.quantization.bnb_int8_layers import FrozenLinear8bit
layer = FrozenLinear8bit.of(torch.nn.Linear(768, 48), threshold=0)
try:
    layer(torch.randn(65, 768))
except CapabilityError as error:
    print("refused" if "VNNI" in str(error) else error)
else:
    print("ran")
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="needs a processor with AVX-512",
)
def test_processors_whose_product_overflows_are_refused() -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OLD_CPU], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"


@pytest.mark.parametrize(
    ("config", "machine", "device", "reason"),
    [
        (CONFIGS["default"], Machine(), "cpu", "pip install bitsandbytes"),
        (CONFIGS["adapters"], Machine(packages={"bitsandbytes": "0.50.2"}), "cpu", "pip install peft"),
        (CONFIGS["default"], Machine(packages={"bitsandbytes": "0.50.2"}), "cpu", None),
        (
            CONFIGS["default"],
            Machine((Gpu("V100", (7, 0), 16 << 30),), packages={"bitsandbytes": "0.50.2"}),
            "cuda",
            "V100 (sm_70)",
        ),
    ],
)
def test_refusal(config: BnbInt8Config, machine: Machine, device: str, reason: str | None) -> None:
    text = config.refusal(machine, "fp32" if device == "cpu" else "fp16", device)
    assert (text is None) == (reason is None)
    if reason is not None:
        assert text is not None
        assert text.startswith("quantization=bnb_int8: ")
        assert reason in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_is_near_the_cpu(dtype: torch.dtype) -> None:
    layer, _ = layer_and_float()
    x = with_outliers()
    wanted = layer(x)
    on_gpu = layer.cuda()
    assert torch.equal(on_gpu.SCB.cpu(), layer_and_float()[0].SCB)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = on_gpu.train()(x.cuda())
        assert torch.equal(got, on_gpu.eval()(x.cuda()))
    assert got.dtype == dtype
    assert error(got.float().cpu(), wanted) < 1e-2
