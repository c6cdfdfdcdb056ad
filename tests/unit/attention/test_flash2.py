"""What flash2 says where it cannot run. What it computes is in tests/kernels, on a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from vit_efficient.attention.flash2 import Flash2Config, autocast
from vit_efficient.errors import CapabilityError
from vit_efficient.machine import Gpu, Machine

PACKAGES = {"flash-attn": "2.8.3"}
T4 = Machine(gpus=(Gpu("Tesla T4", (7, 5), 16 << 30),), packages=PACKAGES)
A100 = Machine(gpus=(Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40 << 30),), packages=PACKAGES)
A100_BARE = Machine(gpus=A100.gpus)
MIXED = Machine(gpus=(*A100.gpus, *T4.gpus), packages=PACKAGES)


@pytest.mark.parametrize(
    ("machine", "precision", "width", "device", "reason", "remedy"),
    [
        (Machine(packages=PACKAGES), "bf16", 64, "cuda", "no GPU", "attention=sdpa"),
        (A100, "bf16", 64, "cpu", "on the CPU", "attention=sdpa"),
        (T4, "fp16", 64, "cuda", r"sm_80 .*Tesla T4 \(sm_75\)", "attention=sdpa"),
        (MIXED, "fp16", 64, "cuda", "Tesla T4", "attention=sdpa"),
        (A100, "fp32", 64, "cuda", "fp32", "quantization.precision=bf16"),
        (A100, "bf16", 320, "cuda", "320", "attention=sdpa"),
        (A100_BARE, "bf16", 64, "cuda", "not installed", "pip install flash-attn"),
    ],
)
def test_refusal(machine: Machine, precision: str, width: int, device: Any, reason: str, remedy: str) -> None:
    text = Flash2Config().refusal(machine, precision, width, device)
    assert text is not None
    assert "attention: flash2" in text
    assert re.search(reason, text)
    assert remedy in text


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("width", [None, 64, 256])
def test_no_refusal(precision: str, width: int | None) -> None:
    assert Flash2Config().refusal(A100, precision, width) is None


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [
        (torch.float32, {}, "float32 on cpu"),
        (torch.bfloat16, {}, "bfloat16 on cpu"),
        (torch.bfloat16, {"bias": torch.zeros(1, 1, 5, 5)}, "no position bias and no mask"),
        (torch.bfloat16, {"mask": torch.ones(5, 5, dtype=torch.bool)}, "no position bias and no mask"),
    ],
)
def test_attend_refuses_and_never_falls_back(dtype: torch.dtype, options: dict[str, Any], reason: str) -> None:
    backend = Flash2Config().build()  # builds anywhere, so that a recipe can be looked at without a GPU
    x = torch.randn(1, 2, 5, 16, dtype=dtype)
    with pytest.raises(CapabilityError, match=rf"attention: flash2.*{reason}.*attention=sdpa"):
        backend.attend(x, x, x, scale=0.25, **options)


def test_autocast_lowers_float32_and_nothing_else() -> None:
    x = torch.randn(2)
    assert autocast(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast(x).dtype is torch.bfloat16
        assert autocast(x.double()).dtype is torch.float64
