"""fp8 layers calibrated: what each step buys, the same answers deployed and loaded, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.errors import CheckpointError, UserError
from vit_efficient.kernels.fp8_linear.reference import Scheme, quantize_weight
from vit_efficient.quantization import gptq, gptq_fp8
from vit_efficient.quantization.calibrate import calibrate
from vit_efficient.quantization.calibration import CalibrationConfig
from vit_efficient.quantization.deploy import deployed_state, load_deployed
from vit_efficient.quantization.fit_fp8 import fit_fp8
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.fp8_layers import Fp8Linear, trainable

CHANNEL, TENSOR = Scheme(), Scheme(weights="tensor", activations="tensor")
NOTHING = CalibrationConfig(shift=False, rounding="nearest", bias_correction=False)
CONFIGS = {
    "default": Fp8Config(calibration=CalibrationConfig()),
    "patches too": Fp8Config(keep=("head",), calibration=CalibrationConfig()),
    "one scale": Fp8Config(keep=(), weights="tensor", activations="tensor", calibration=CalibrationConfig()),
    "mse": Fp8Config(calibration=CalibrationConfig(rounding="mse", shift=False)),
    "nearest": Fp8Config(calibration=CalibrationConfig(rounding="nearest", importance=False)),
}


def seen(rows: int = 400, inputs: int = 48, seed: int = 0) -> Tensor:
    """Correlated inputs, some of them far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, 16, generator=generator) @ torch.randn(
        16, inputs, generator=torch.Generator().manual_seed(9)
    )
    return mixed + 0.3 * torch.randn(rows, inputs, generator=generator) + torch.linspace(-20, 20, inputs)


def layer_of(scheme: Scheme = CHANNEL, inputs: int = 48, bias: bool = True) -> Fp8Linear:
    torch.manual_seed(1)
    layer = trainable(nn.Linear(inputs, 24, bias=bias), scheme)
    assert isinstance(layer, Fp8Linear)
    return layer


@torch.no_grad()
def errors_on_others(config: CalibrationConfig, scheme: Scheme = CHANNEL) -> float:
    layer, x = layer_of(scheme), seen(seed=5)
    target = nn.functional.linear(x, layer.weight, layer.bias)
    fit_fp8("layer", layer, seen(), None, config)
    return float((layer(x) - target).square().mean() / target.var())


@pytest.mark.parametrize("scheme", [CHANNEL, TENSOR], ids=["channel", "tensor"])
def test_each_step_lowers_the_error_on_inputs_that_were_not_seen(scheme: Scheme) -> None:
    plain = errors_on_others(NOTHING, scheme)
    shifted = errors_on_others(NOTHING.model_copy(update={"shift": True}), scheme)
    fitted = errors_on_others(CalibrationConfig(), scheme)
    assert shifted < 0.3 * plain
    assert fitted < 0.7 * shifted


def test_reported_error_is_the_layers_own() -> None:
    layer, x = layer_of(), seen()
    target = nn.functional.linear(x, layer.weight, layer.bias)
    found = fit_fp8("layer", layer, x, None, CalibrationConfig())
    own = (layer(x) - target).square().mean() / target.square().mean()
    assert found.error == pytest.approx(float(own), rel=1e-3)
    assert not found.constant


def test_shift_and_bias_follow_the_tokens_that_matter() -> None:
    x, weight = seen(), torch.zeros(400)
    weight[:50] = 1
    layer = layer_of(bias=False)
    target = nn.functional.linear(x, layer.weight)
    fit_fp8("layer", layer, x, weight, CalibrationConfig())
    assert layer.shift is not None
    torch.testing.assert_close(layer.shift, x[:50].mean(dim=0), rtol=1e-4, atol=1e-4)
    assert (layer(x) - target)[:50].mean(dim=0).abs().max() < 1e-4  # the mean error of those is corrected away
    assert (layer(x) - target)[50:].mean(dim=0).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", [CHANNEL, TENSOR], ids=["channel", "tensor"])
def test_codes_are_e4m3_and_kept_when_they_are_made_anew(scheme: Scheme) -> None:
    weight, x = layer_of().weight.detach().clone(), seen()
    weight[3], weight[4, 0] = 0, 10
    codes, scale = gptq_fp8.quantize(weight, x.T @ x / len(x), scheme)
    assert scale.shape == ((24, 1) if scheme.weights == "channel" else (1, 1))
    assert torch.equal(gptq_fp8.nearest(codes), codes)
    again, kept = quantize_weight(codes * scale, scheme, scale)
    assert torch.equal(again.float(), codes)
    assert torch.equal(kept, scale)


def test_no_row_is_worse_than_rounded_to_nearest() -> None:
    for seed in range(5):
        weight, x = torch.randn(24, 48, generator=torch.Generator().manual_seed(seed)), seen(seed=seed)
        h = gptq.damped(x.T @ x / len(x), gptq_fp8.DAMPING)
        codes, scale = gptq_fp8.quantize(weight, x.T @ x / len(x), CHANNEL)
        plain, amax = quantize_weight(weight, CHANNEL)
        own, least = gptq._errors(weight, h, codes * scale), gptq._errors(weight, h, plain.float() * amax)
        assert (own <= least * (1 + 1e-5)).all()
        assert own.sum() < 0.5 * least.sum()


def test_searched_scales_are_the_best_of_a_factor_of_two() -> None:
    weight, h = layer_of().weight.detach(), seen().square().mean(dim=0)
    _, amax = quantize_weight(weight, CHANNEL)
    scale = gptq_fp8.search_scale(weight, h, CHANNEL)

    def error(scale: Tensor) -> Tensor:
        return ((gptq_fp8.nearest(weight / scale) * scale - weight).square() * h).sum(dim=1)

    assert ((scale >= amax) & (scale < 2 * amax)).all()
    tried = torch.stack([error(amax * 2 ** (k / gptq_fp8.CANDIDATES)) for k in range(gptq_fp8.CANDIDATES)])
    torch.testing.assert_close(error(scale), tried.amin(dim=0))
    assert (error(scale) < error(amax)).sum() > 12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_that_cannot_be_fitted_to(bad: float) -> None:
    x = seen()
    x[7, 3] = bad
    with pytest.raises(UserError, match="NaN or an infinity"):
        fit_fp8("layer", layer_of(), x, None, CalibrationConfig())
    with pytest.raises(UserError, match="saw no activations"):
        fit_fp8("layer", layer_of(), x[:0], None, CalibrationConfig())


def test_a_constant_input_is_no_obstacle() -> None:
    layer, x = layer_of(), torch.full((20, 48), 3.0)
    target = nn.functional.linear(x, layer.weight, layer.bias)
    fit_fp8("layer", layer, x, None, CalibrationConfig())
    torch.testing.assert_close(layer(x), target)


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "num_classes": 10, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    swap_attention(model, SdpaConfig().build())
    return model


def calibrated(config: Fp8Config) -> nn.Module:
    model = plain_model()
    config.apply(model, compute_dtype=torch.float32)
    assert config.calibration is not None
    calibrate(model, [torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(2))], config.calibration)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_training_logits_equal_deployed_logits_bit_for_bit(name: str, tmp_path: Path) -> None:
    """By finalizing in place, by a file in a fresh model, and by a checkpoint in a freshly quantized one."""
    config, images = CONFIGS[name], torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    model, fresh, resumed = calibrated(config), plain_model(), plain_model()
    with torch.no_grad():
        trained = model.train()(images)
    tensors, metadata = deployed_state(model)
    save_file(tensors, tmp_path / "m.safetensors")
    load_deployed(fresh, load_file(tmp_path / "m.safetensors"), metadata)
    config.apply(resumed, compute_dtype=torch.float32)
    resumed.load_state_dict(model.state_dict())
    config.finalize(model)
    assert (model.blocks[0].attn.qkv.shift is not None) == config.calibration.shift  # type: ignore[union-attr]
    with torch.no_grad():
        for other in (model, fresh, resumed):
            assert torch.equal(other.eval()(images), trained)
    again, described = deployed_state(fresh)
    assert described == metadata
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_shift_stays_float32_and_the_output_follows_the_model() -> None:
    """As a `DeployedFp8` keeps its own, so does a trainable layer; and a shift makes no float32 of the outputs."""
    model = calibrated(CONFIGS["default"])
    layer = model.blocks[0].mlp.fc1
    shift, scale = layer.shift.clone(), layer.weight_scale.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.shift, shift)
    assert torch.equal(layer.weight_scale, scale)
    with torch.no_grad():
        assert layer(torch.randn(2, 5, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_calibrated_layers_train() -> None:
    model = calibrated(CONFIGS["patches too"])
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_file_without_its_shift_is_refused() -> None:
    tensors, metadata = deployed_state(calibrated(CONFIGS["mse"].model_copy(update={"calibration": NOTHING})))
    load_deployed(plain_model(), tensors, metadata)
    tensors, metadata = deployed_state(calibrated(CONFIGS["default"]))
    name = "blocks.0.attn.qkv.shift"
    for wrong in ({key: value for key, value in tensors.items() if key != name}, tensors | {name: tensors[name][:-1]}):
        with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv(.|\n)*shift"):
            load_deployed(plain_model(), wrong, metadata)


def test_keys_that_nothing_reads_are_refused() -> None:
    assert not Fp8Config().needs_calibration
    assert Fp8Config(calibration=CalibrationConfig()).needs_calibration
    for key, value in {"observer": "mse", "percentile": 99.0, "smooth": 0.5}.items():
        with pytest.raises(ValidationError, match=f"{key}, which is for integers"):
            Fp8Config.model_validate({"calibration": {key: value}})
    whole = Fp8Config(calibration=CalibrationConfig())
    assert Fp8Config.model_validate(whole.model_dump()) == whole  # a written recipe names every key
