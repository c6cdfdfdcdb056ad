"""`run_verify`: sound backends pass, and a fault is found in the layer that has it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.swap import swap_attention
from vit_efficient.data.image import ImageSpec
from vit_efficient.engine import backends
from vit_efficient.engine.backends import Backend, Operands, observe, substituted
from vit_efficient.engine.fused_run import FusedRun
from vit_efficient.engine.parts import code_layers, code_parts, definition, integer_layers, ordinals
from vit_efficient.engine.tally import Tally, VerifyResult
from vit_efficient.engine.verify import run_verify
from vit_efficient.errors import UserError
from vit_efficient.kernels.fp8_attention import op as fp8_attention_op
from vit_efficient.kernels.fp8_linear import op as fp8_op
from vit_efficient.kernels.fp8_linear import reference as fp8_reference
from vit_efficient.kernels.int8_attention import op as attention_op
from vit_efficient.kernels.int8_attention import reference as attention_reference
from vit_efficient.kernels.int8_linear import op, passes, reference
from vit_efficient.kernels.linear import op as linear
from vit_efficient.model.fused import FusedBlock
from vit_efficient.quantization.fp8 import Fp8Config
from vit_efficient.quantization.fp8_layers import TrainableFp8
from vit_efficient.quantization.fused_linear import Codes, FusedLinear
from vit_efficient.quantization.int8_attention import integer_attention, quantize_attention, quantize_attention_fp8
from vit_efficient.quantization.int8_layers import DeployedInt8
from vit_efficient.quantization.surgery import replace

Make = Callable[..., nn.Module]
IMAGE = ImageSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9)
OWN = "torch._int_mm" if op.cpu_int_mm_is_exact() else "float32 sums"


def batches(count: int = 2) -> list[Tensor]:
    return list(torch.randn(count, 3, 3, 32, 32, generator=torch.Generator().manual_seed(7)).unbind())


def verify(model: nn.Module, images: list[Tensor] | None = None) -> tuple[VerifyResult, str]:
    console = Console(file=io.StringIO(), width=160)
    result = run_verify(model, IMAGE, batches() if images is None else images, console)
    return result, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("scheme", ["W8A8 token", "W8A8 tensor", "W8A8 static", "W4A8 groups", "W4A4"])
def test_every_scheme_keeps_the_bounds(integer_model: Make, scheme: str) -> None:
    model = integer_model(scheme)
    result, printed = verify(model)
    assert result.ok
    assert list(result.layers[OWN]) == list(integer_layers(model))
    for layer, tally in result.layers[OWN].items():
        assert tally.total > 0
        assert tally.digests() == result.layers["reference"][layer].digests()
        assert printed.count(tally.digests()) == 2
    assert result.logits[OWN] == 0
    assert result.bf16[OWN] == (1.0, 0.0)
    assert 0 < result.bf16["fp32"][1] < 0.2
    assert f"verified: reference, {OWN}, fused keep" in printed
    assert "onnx: absent" in printed


@pytest.mark.gpu
def test_a_gpu_keeps_the_bounds(integer_model: Make) -> None:
    result, printed = verify(integer_model("all").cuda())
    assert result.ok, printed
    assert {"Triton", "torch._int_mm"} <= set(result.layers)
    assert all(counted.share == 1 for counted in result.layers["Triton"].values())
    result, printed = verify(integer_model("W8A8 static", depth=2).cuda())
    assert result.ok, printed
    assert list(result.layers["fused"]) == list(result.layers["Triton"])


@pytest.mark.gpu
def test_a_fault_of_the_kernel_is_not_hidden(integer_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes that are seen are those given to the kernel, not those that the layer says it makes."""
    quantize = op.quantize_activations

    def rounded_down(x_MK: Tensor, scheme: Any, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, scale = quantize(x_MK, scheme, given)
        return (x_MK.float() / scale).floor().clamp(-127, 127).to(torch.int8), scale

    monkeypatch.setattr(op, "quantize_activations", rounded_down)  # which `DeployedInt8.codes` does not call
    result, _ = verify(integer_model().cuda())
    assert {layer for name, layer, _ in result.failures if name == "Triton"} >= set(integer_layers(integer_model()))


def floor_rows(x: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    _, scale = reference.quantize_rows(x, largest)
    return (x / scale).floor().to(torch.int8), scale


def inject(layer: DeployedInt8, *, rows: Any = reference.quantize_rows, matmul: Any = reference.int8_matmul) -> None:
    """Give one layer another arithmetic."""

    def multiply(tokens: Tensor, dtype: torch.dtype) -> Tensor:
        q_MK, scale_M1 = rows(tokens.reshape(-1, tokens.shape[-1]))
        sums = matmul(q_MK, layer.weight_codes())
        y = reference.epilogue(sums, scale_M1, layer.weight_scale.reshape(-1), layer.bias, dtype)
        return y.view(*tokens.shape[:-1], -1)

    layer.multiply = multiply  # type: ignore[method-assign]


def test_another_rounding_in_one_layer_is_caught_and_named(integer_model: Make) -> None:
    model = integer_model(depth=3)
    inject(model.blocks[1].mlp.fc1)  # type: ignore[union-attr, index, arg-type]
    assert verify(model)[0].ok  # the same arithmetic in other words
    inject(model.blocks[1].mlp.fc1, rows=floor_rows)  # type: ignore[union-attr, index, arg-type]
    result, printed = verify(model)
    assert not result.ok
    backend, layer, reason = result.failures[0]
    assert (backend, layer) == (OWN, "blocks.1.mlp.fc1")
    assert {name for _, name, _ in result.failures} == {"blocks.1.mlp.fc1", "logits"}  # and no layer behind it
    assert "must be" in reason
    assert f"broken: {OWN}, blocks.1.mlp.fc1" in printed
    assert "verified" not in printed
    digests = [[t.digests() for t in result.layers[name].values()] for name in ("reference", OWN)]
    first = next(i for i, (a, b) in enumerate(zip(*digests, strict=True)) if a != b)
    assert list(result.layers[OWN])[first] == "blocks.1.mlp.fc1"


def test_another_rounding_everywhere_is_caught(integer_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = integer_model()
    monkeypatch.setattr(passes, "quantize_rows", floor_rows)
    result, _ = verify(model)
    assert {layer for _, layer, _ in result.failures} >= set(integer_layers(model))
    assert result.failures[0][1] == next(iter(integer_layers(model)))
    assert result.layers[OWN]["blocks.0.attn.qkv"].share < 0.9


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_integer_attention_is_verified_too(integer_model: Make, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    model = integer_model(depth=2)
    quantize_attention(model, mode)
    for attend in integer_attention(model).values():
        if mode == "static":
            attend.set_scales(q=0.03, k=0.03, v=0.03)
    result, printed = verify(model)
    assert result.ok, printed
    assert list(result.layers[OWN])[:3] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn"]
    counted = result.layers[OWN]["blocks.0.attn"]
    assert counted.total == 2 * 3 * 3 * (17 * 48)  # batches, images, operands
    assert all("attend" not in attend.__dict__ for attend in integer_attention(model).values())

    def rounded_down(x: Tensor, granularity: Any, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, own = attention_reference.quantize(x, granularity, scale)
        return (x / own).floor().clamp(-127, 127).to(torch.int8), own

    monkeypatch.setattr(attention_op, "quantize", rounded_down)
    result, _ = verify(model)
    assert {layer for _, layer, _ in result.failures} - {"logits"} == {"blocks.0.attn", "blocks.1.attn"}


@pytest.mark.parametrize(("values", "operands"), [("float", 2), ("fp8", 3)])
def test_other_forms_of_integer_attention_are_verified(
    integer_model: Make, monkeypatch: pytest.MonkeyPatch, values: Any, operands: int
) -> None:
    model = integer_model()
    quantize_attention(model, "dynamic", values=values, keys="block")
    result, printed = verify(model)
    assert result.ok, printed
    assert result.layers[OWN]["blocks.0.attn"].total == 2 * 3 * operands * (17 * 48)  # batches, images, codes
    by_token = attention_reference.quantize_keys
    monkeypatch.setattr(attention_op, "quantize_keys", lambda k, keys, *rest: by_token(k, "token", *rest))
    result, _ = verify(model)
    assert "blocks.0.attn" in {layer for _, layer, _ in result.failures}


@pytest.mark.parametrize(("values", "operands"), [("float", 2), ("fp8", 3)])
def test_fp8_attention_is_verified(values: Any, operands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fp8_model()
    quantize_attention_fp8(model, values)
    result, printed = verify(model)
    assert result.ok, printed
    counted = next(iter(result.layers.values()))["blocks.0.attn"]
    assert counted.total == 2 * 3 * operands * (17 * 48)  # heads are 16 wide, so rotated ones too
    right = fp8_attention_op.quantize_values
    monkeypatch.setattr(fp8_attention_op, "quantize_values", lambda v, values: right(1.1 * v, values))
    result, _ = verify(model)
    assert {layer for _, layer, _ in result.failures} - {"logits"} == {"blocks.0.attn", "blocks.1.attn"}


def test_a_wrong_softmax_is_caught_by_its_output(integer_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = integer_model()
    quantize_attention(model, "dynamic")
    monkeypatch.setattr(attention_op, "softmax", lambda s: torch.softmax(2 * s, dim=-1))
    result, _ = verify(model)
    backend, layer, reason = result.failures[0]
    assert (backend, layer) == (OWN, "blocks.0.attn")
    assert "the bound is 1e-05" in reason


def fp8_model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=10
    )
    swap_attention(model, SdpaConfig().build())
    config = Fp8Config()
    config.apply(model, compute_dtype=torch.float32)
    for layer in model.modules():
        if isinstance(layer, TrainableFp8):
            layer.shift = 0.1 * torch.randn(layer.shape[1])
    config.finalize(model)
    return model.eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fp8_is_verified(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "torch._scaled_mm" if device == "cuda" else "fp8 in float32"
    result, printed = verify(fp8_model().to(device))
    assert result.ok, printed
    assert list(result.layers) == ["reference", own, "fused"]
    assert len(result.layers[own]) == 8
    assert all(counted.share == 1 and counted.total > 0 for counted in result.layers[own].values())
    assert "onnx" not in printed.partition("absent")[2]

    def towards_zero(x_MK: Tensor, scheme: Any, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        codes, scale = fp8_reference.quantize_activations(x_MK, scheme, given)
        return (codes.view(torch.uint8) & 0xFE).view(codes.dtype), scale  # the last bit of the mantissa dropped

    monkeypatch.setattr(fp8_op, "quantize_activations", towards_zero)
    result, printed = verify(fp8_model().to(device))
    assert {layer for _, layer, _ in result.failures} >= set(code_parts(fp8_model()))
    assert all(counted.largest == 1 for counted in result.layers[own].values())


@pytest.mark.parametrize("make", ["int8", "grouped", "fp8"])
def test_fused_blocks_are_verified(integer_model: Make, make: str) -> None:
    """On a CPU bit for bit: codes, digests, logits."""
    schemes = {"int8": "W8A8 static", "grouped": "W4A8 groups"}
    model = fp8_model() if make == "fp8" else integer_model(schemes[make], depth=2)
    result, printed = verify(model)
    assert result.ok, printed
    assert list(result.layers["fused"]) == list(result.layers["reference"]) == list(code_layers(model))
    for layer, counted in result.layers["fused"].items():
        assert counted.total == counted.equal == counted.running > 0
        codes, outputs = counted.digests().split()
        assert codes == result.layers["reference"][layer].digests().split()[0]
        assert outputs == "--------"
    assert result.logits["fused"] == 0
    assert result.top1["fused"] == (6, 6)
    assert result.given == (0.0, 0.0)
    assert "logits differ from the reference's by 0.0e+00 of their norm; 100 % of the last layer's" in printed
    assert "the same top-1 on 6 of 6 images" in printed
    assert "fused, each layer given the same codes: logits differ by 0.0e+00" in printed
    assert not any(isinstance(module, FusedBlock) for module in model.modules())


@pytest.mark.parametrize(
    ("block", "shows"), [(1, ["blocks.2.attn.qkv", "blocks.2.mlp.fc1", "logits"]), (2, ["logits"])]
)
def test_a_fault_between_fused_layers_is_named_where_it_shows(
    integer_model: Make, monkeypatch: pytest.MonkeyPatch, block: int, shows: list[str]
) -> None:
    """Half of the MLP's part of a block is lost: what reads the residual stream has other codes, nothing else has."""
    model = integer_model(depth=3)
    add_output, narrow = FusedLinear.add_output, model.blocks[block].mlp.fc2  # type: ignore[union-attr, index]

    def halved(self: FusedLinear, x: Codes, residual: Tensor, gamma: Tensor | None) -> Tensor:
        y = add_output(self, x, residual, gamma)
        return (y + residual) / 2 if self.layer.weight.equal(narrow.weight) else y  # type: ignore[union-attr, arg-type]

    monkeypatch.setattr(FusedLinear, "add_output", halved)
    result, printed = verify(model)
    assert {name for name, _, _ in result.failures} == {"fused"}
    assert sorted({layer for _, layer, _ in result.failures}) == shows
    assert f"broken: fused, {shows[0]}" in printed
    assert any(layer == "logits" and "on the same codes" in reason for _, layer, reason in result.failures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_blocks_run_by_their_definitions_too(integer_model: Make, dtype: torch.dtype) -> None:
    run, images = FusedRun(integer_model("W8A8 static", depth=2).to(dtype)), batches(1)[0].to(dtype)
    logits, names = run(images), []

    def see(name: str, codes: Tensor, wanted: Tensor) -> None:
        assert codes.equal(wanted)
        names.append(name)

    assert run.by_definition(images, see).equal(logits)
    assert names == [name for name in run.entered if name.startswith("blocks.")]
    first = run.entered["blocks.0.mlp.fc1"]
    run.entered["blocks.0.mlp.fc1"] = first._replace(values=-first.values)
    differing: list[str] = []
    run.by_definition(images, lambda name, codes, wanted: None if codes.equal(wanted) else differing.append(name))
    assert differing[:2] == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]  # what is given is what is multiplied


def test_why_nothing_is_fused_is_said(integer_model: Make) -> None:
    model = integer_model()
    replace(model, "blocks.0.mlp.fc2", nn.Linear(192, 48))
    result, printed = verify(model)
    assert "fused" not in result.layers
    assert "fused: absent, not fused: blocks.0: mlp.fc2 is kept in floating point" in printed


def test_every_product_of_codes_is_seen_and_can_be_substituted() -> None:
    x, w = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((6, 16), (24, 16)))
    row, column = torch.rand(6, 1), torch.rand(24, 1)
    operands = (x, row, w, column, None)
    calls: dict[str, Callable[[], Any]] = {
        "linear": lambda: linear.linear(*operands, dtype=torch.float32),
        "linear_quant": lambda: linear.linear_quant(*operands, torch.tensor(0.1)),
        "linear_residual": lambda: linear.linear_residual(*operands, torch.rand(6, 24)),
        "linear_heads": lambda: linear.linear_heads(x.view(2, 3, 16), *operands[1:], 2, dtype=torch.float32),
        "linear_heads_quant": lambda: linear.linear_heads_quant(x.view(2, 3, 16), *operands[1:], 2),
        "int8_matmul": lambda: op.int8_matmul(x, w),
    }
    for name, call in calls.items():
        with Operands() as seen:
            call()
        codes = seen.take()
        assert codes is not None, name
        assert codes.equal(x), name
        assert seen.take() is None
    with substituted(off_by_one)(nn.Identity()):
        found = calls["linear"]()
    assert found.equal(reference.epilogue(off_by_one(x, w), row, column[:, 0], None, torch.float32))


def test_the_table_fits_80_columns(integer_model: Make) -> None:
    console = Console(file=io.StringIO(), width=80)
    run_verify(integer_model(depth=1), IMAGE, batches(), console)
    table = console.file.getvalue().partition("equal, off:")[0]  # type: ignore[attr-defined]
    assert all(len(line.rstrip()) <= 80 for line in table.splitlines())
    fused = [line.split() for line in table.splitlines() if " fused " in line]
    assert len(fused) == 5
    assert all(row[-2:] == ["%", "0"] and len(row) == 6 for row in fused)


def test_neighbouring_fp8_values_are_one_apart() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e4m3fn)
    values = codes.float()
    finite = values.isfinite()
    order = ordinals(codes)[finite].to(torch.int64)
    ranked = values[finite].unique(return_inverse=True)[1]  # both zeros are one
    assert torch.equal(order - order.min(), ranked)


def off_by_one(q_MK: Tensor, q_NK: Tensor) -> Tensor:
    return reference.int8_matmul(q_MK, q_NK) + 1


@pytest.mark.parametrize("exact", [True, False])
def test_a_product_that_is_wrong_is_caught(integer_model: Make, monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    """Its codes are right, and so are the next layer's from what it made: only outputs tell."""
    sound = Backend(True, lambda device: None, substituted(reference.int8_matmul))
    monkeypatch.setitem(backends.BACKENDS, "sound", sound)
    assert verify(integer_model())[0].ok
    monkeypatch.setitem(backends.BACKENDS, "new", Backend(exact, lambda device: None, substituted(off_by_one)))
    result, printed = verify(integer_model())
    assert {backend for backend, _, _ in result.failures} == {"new"}
    assert result.layers["new"]["blocks.0.attn.qkv"].share == 1
    assert "outputs differ" in printed


def test_a_backend_that_cannot_run_is_named_with_its_reason(
    integer_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = Backend(False, lambda device: f"needs a GPU, and this is {device}", substituted(off_by_one))
    monkeypatch.setitem(backends.BACKENDS, "new", absent)
    result, printed = verify(integer_model())
    assert result.ok
    assert "new: absent, needs a GPU, and this is cpu" in printed


def tally(total: int, wrong: int, by: int, exact: bool = True, bound: float = 0.0) -> Tally:
    codes = torch.zeros(1, total, dtype=torch.int8)
    codes[0, :wrong] = by
    counted, y = Tally(exact, bound), torch.ones(1, 4)
    counted.add(codes, y, torch.zeros_like(codes), y, codes)
    return counted


def test_bounds(integer_model: Make) -> None:
    assert tally(10_000, 1, 1, False).breach() is None
    assert "99.9900 % of the codes" in (tally(10_000, 1, 1).breach() or "")
    assert "99.9800 %" in (tally(10_000, 2, 1, False).breach() or "")
    assert "largest difference 2" in (tally(20_000, 1, 2, False).breach() or "")
    assert tally(100, 0, 0).breach() is None
    wide = FusedRun(fp8_model()).tally("blocks.0.attn.qkv")
    assert (wide.exact, round(wide.least, 3), wide.off_by) == (True, 0.97, 254)
    narrow = FusedRun(integer_model())
    assert narrow.tally("blocks.0.mlp.fc1").least == 0.9999
    assert narrow.tally("blocks.0.mlp.fc2").least == 0.999
    other, exact = tally(100, 0, 0, False, 1e-5), tally(100, 0, 0)
    zeros, y = torch.zeros(1, 1, dtype=torch.int8), torch.ones(1, 4)
    for one in (other, exact):
        one.add(zeros, y * (1 + 1e-6), zeros, y, zeros)
    assert other.breach() is None
    assert "must be equal" in (exact.breach() or "")
    other.add(zeros, y * torch.nan, zeros, y, zeros)
    assert "outputs differ" in (other.breach() or "")


def test_the_codes_seen_are_those_of_the_product(integer_model: Make) -> None:
    model = integer_model("W4A8 groups")
    seen = []
    observe(model, batches(1)[0], backends.BACKENDS[OWN], seen.append)
    assert [one.name for one in seen] == list(integer_layers(model))
    for one in seen:
        codes, y = definition(one.part, one.inputs, one.y.dtype)
        assert torch.equal(one.codes, codes)
        assert torch.equal(one.y, y)
    assert all(not layer._forward_hooks and not layer._forward_pre_hooks for layer in integer_layers(model).values())


def test_what_a_half_precision_run_ships_is_verified_too(integer_model: Make) -> None:
    model = integer_model()
    model.head.to(torch.bfloat16)  # type: ignore[union-attr, operator]
    assert verify(model)[0].ok


@pytest.mark.parametrize(
    ("images", "text"),
    [
        ([], "no images"),
        ([torch.zeros(2, 3, 16, 16)], r"\(2, 3, 16, 16\), not \(B, 3, 32, 32\)"),
        ([torch.full((1, 3, 32, 32), torch.nan)], "NaN"),
    ],
)
def test_images_that_are_refused(integer_model: Make, images: list[Tensor], text: str) -> None:
    with pytest.raises(UserError, match=text):
        verify(integer_model(), images)


def test_a_model_without_integer_products_is_refused(integer_model: Make) -> None:
    for model in (nn.Linear(3, 3), integer_model("W4")):
        with pytest.raises(UserError, match="no layer that multiplies codes"):
            verify(model)


@pytest.mark.parametrize(("rounded", "drift", "bound"), [(False, 0.03, 1e-2), (True, 0.03, 0.03), (True, 0.001, 1e-2)])
def test_bound_under_bf16(rounded: bool, drift: float, bound: float) -> None:
    """Where fp8 units sum, what bf16 does to the reference itself, if that is more than the bound."""
    result = VerifyResult(bf16={"fp32": (0.8, drift)}, rounded_sums=rounded)
    assert result.bf16_bound == bound
