"""PyTorch's attention against the definition, and forced kernels that cannot run."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from vit_efficient.attention import reference
from vit_efficient.attention.sdpa import SdpaConfig, merge
from vit_efficient.errors import CapabilityError
from vit_efficient.machine import Gpu, Machine

T4 = Machine(gpus=(Gpu("Tesla T4", (7, 5), 16 << 30),))
A100 = Machine(gpus=(Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40 << 30),))
MIXED = Machine(gpus=(*A100.gpus, *T4.gpus))
CPU_ONLY = Machine()


def inputs(tokens: int, heads: int = 3, width: int = 20, logits: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a layer makes them: views of one fused projection, so none of them is contiguous."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(2, tokens, 3, heads, width, generator=generator, requires_grad=True)
    q, k, v = (qkv * torch.tensor([logits, 1, 1]).view(3, 1, 1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def compare(kernel: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    scale = q.shape[-1] ** -0.5
    got = SdpaConfig(kernel=kernel).build().attend(q, k, v, scale=scale, **options)
    wanted = reference.attend(q.double(), k.double(), v.double(), scale=scale, **options)
    weight = torch.linspace(-1, 1, got.numel()).view_as(got)
    got_grads = torch.autograd.grad((got * weight).sum(), (q, k, v), retain_graph=True)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    assert not q.is_contiguous()
    floor = max(float(grad.norm()) for grad in wanted_grads)  # with one token q and k have no gradient at all
    for one, other in zip((got, *got_grads), (wanted, *wanted_grads), strict=True):
        assert (one - other).detach().norm() < 2e-6 * max(float(other.detach().norm()), floor)


@pytest.mark.parametrize("kernel", ["auto", "math", "flash"])
@pytest.mark.parametrize("tokens", [1, 63, 196, 197, 198])
def test_output_and_gradients_equal_the_definition(kernel: str, tokens: int) -> None:
    compare(kernel, *inputs(tokens))


@pytest.mark.parametrize("kernel", ["auto", "math", "flash"])
def test_small_logits(kernel: str) -> None:
    """Near uniform attention is the mean of the values: a padded key that is counted shows at once."""
    q, k, v = inputs(197, logits=1e-4)
    compare(kernel, q, k, v)
    y = SdpaConfig(kernel=kernel).build().attend(q, k, v, scale=1.0)
    assert torch.allclose(y, v.mean(2, keepdim=True).expand_as(y), atol=1e-3)


@pytest.mark.parametrize("kernel", ["auto", "math", "flash"])
def test_bias_and_mask_together(kernel: str) -> None:
    q, k, v = inputs(17)
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) > 0.4
    mask |= torch.eye(17, dtype=torch.bool)  # a row without any key has no softmax
    compare(kernel, q, k, v, bias=torch.randn(1, 3, 17, 17), mask=mask)


def test_scale_is_obeyed_and_not_a_default() -> None:
    q, k, v = inputs(17)
    backend = SdpaConfig().build()
    wanted = reference.attend(q, k, v, scale=0.7)
    assert torch.allclose(backend.attend(q, k, v, scale=0.7), wanted, atol=1e-6)
    assert not torch.allclose(backend.attend(q, k, v, scale=0.1), wanted, atol=1e-3)


def test_merge_takes_the_dtype_of_the_queries() -> None:
    bias, mask = torch.ones(2, 2), torch.tensor([[True, False], [True, True]])
    merged = merge(bias, mask, torch.bfloat16)
    assert merged is not None
    assert merged.dtype is torch.bfloat16
    assert merged.tolist() == [[1, -torch.inf], [1, 1]]
    assert merge(None, mask, torch.bfloat16) is mask
    assert merge(None, None, torch.bfloat16) is None


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_forced_kernel_that_is_not_there_raises(kernel: Any) -> None:
    q, k, v = inputs(17)
    with pytest.raises(CapabilityError, match=rf"attention\.kernel={kernel}.*float32 on cpu.*attention\.kernel=auto"):
        SdpaConfig(kernel=kernel).build().attend(q, k, v, scale=1.0)


def test_a_forced_kernel_gives_the_reason_of_pytorch() -> None:
    q, k, v = inputs(17)
    with pytest.raises(CapabilityError, match="dropout"):
        SdpaConfig(kernel="flash").build().attend(q, k, v, scale=1.0, dropout=0.1)


def test_other_errors_are_passed_on_as_they_are() -> None:
    q, k, v = inputs(17)
    with pytest.raises(RuntimeError) as error:
        SdpaConfig(kernel="math").build().attend(q, k[..., :3], v, scale=1.0)
    assert not isinstance(error.value, CapabilityError)


@pytest.mark.parametrize(
    ("kernel", "machine", "precision", "width", "device", "reason"),
    [
        ("flash", T4, "fp16", 64, "cuda", r"sm_80 or newer, and this is a Tesla T4 \(sm_75\)"),
        ("flash", MIXED, "fp16", 64, "cuda", "Tesla T4"),
        ("cudnn", T4, "fp16", 64, "cuda", "sm_80"),
        ("flash", A100, "fp32", 64, "cuda", "fp32"),
        ("cudnn", A100, "fp32", None, "cuda", "fp32"),
        ("flash", A100, "bf16", 288, "cuda", "288"),
        ("efficient", CPU_ONLY, "fp32", 64, "cuda", "no GPU"),
        ("cudnn", A100, "bf16", 64, "cpu", "NVIDIA GPUs only"),
        ("efficient", A100, "bf16", 64, "cpu", "NVIDIA GPUs only"),
    ],
)
def test_refusal(kernel: Any, machine: Machine, precision: str, width: int | None, device: Any, reason: str) -> None:
    text = SdpaConfig(kernel=kernel).refusal(machine, precision, width, device)
    assert text is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(text)
    assert "attention.kernel=auto" in text


@pytest.mark.parametrize(
    ("kernel", "machine", "precision", "device"),
    [
        ("auto", CPU_ONLY, "fp32", "cpu"),
        ("math", T4, "fp32", "cuda"),
        ("flash", CPU_ONLY, "fp32", "cpu"),
        ("flash", A100, "bf16", "cuda"),
        ("cudnn", A100, "fp16", "cuda"),
        ("efficient", T4, "fp32", "cuda"),
    ],
)
def test_no_refusal(kernel: Any, machine: Machine, precision: str, device: Any) -> None:
    assert SdpaConfig(kernel=kernel).refusal(machine, precision, 64, device) is None


def test_unknown_kernel_is_refused_by_the_schema() -> None:
    with pytest.raises(ValidationError, match="auto"):
        SdpaConfig(kernel="fast")  # type: ignore[arg-type]


def test_the_config_module_stays_lean() -> None:
    code = (
        "import sys, vit_efficient.attention.config; "
        "print([m for m in ('timm', 'lightning', 'flash_attn', 'peft') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
