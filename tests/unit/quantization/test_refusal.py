"""What each backend says to machines that cannot run it."""

from __future__ import annotations

from typing import Any

import pytest

from vit_efficient.machine import Gpu, Machine
from vit_efficient.quantization.base import LoraConfig
from vit_efficient.quantization.int4 import Int4Config
from vit_efficient.quantization.int8 import Int8Config
from vit_efficient.quantization.none import NoneConfig

PACKAGES = {"bitsandbytes": "0.50.2", "peft": "0.21.2"}
V100 = Machine((Gpu("V100", (7, 0), 16 << 30),), packages=PACKAGES)
T4 = Machine((Gpu("T4", (7, 5), 16 << 30),), packages=PACKAGES)
A100 = Machine((Gpu("A100", (8, 0), 80 << 30),), packages=PACKAGES)
MIXED = Machine((*A100.gpus, *V100.gpus), packages=PACKAGES)
CPU = Machine(packages=PACKAGES)
BARE = Machine(A100.gpus)
H100 = Machine((Gpu("H100", (9, 0), 80 << 30),), packages=PACKAGES)
E4M3_VALUES = Int8Config(attention="dynamic", attention_values="fp8")
INT8, INT4, NONE, LORA = Int8Config(), Int4Config(), NoneConfig(), NoneConfig(lora=LoraConfig())


@pytest.mark.parametrize(
    ("config", "machine", "precision", "device", "reason", "remedy"),
    [
        (INT8, V100, "fp16", "cuda", "V100 (sm_70)", "quantization=none"),
        (INT8, MIXED, "fp16", "cuda", "V100 (sm_70)", "quantization=none"),  # one old GPU among new ones
        (INT8, T4, "bf16", "cuda", "sm_80", "precision=fp16"),
        (INT4, T4, "bf16", "cuda", "sm_80", "precision=fp16"),
        (NONE, V100, "bf16", "cuda", "sm_80", "precision=fp16"),
        (INT8, CPU, "fp16", "cpu", "fp16", "fp32 or bf16"),
        (NONE, CPU, "fp16", "cpu", "fp16", "fp32 or bf16"),
        (NONE, CPU, "fp32", "cuda", "no GPU", "CPU"),
        (INT4, BARE, "bf16", "cuda", "bitsandbytes", "pip install bitsandbytes"),
        (INT4, Machine(packages={"bitsandbytes": "0.50.2"}), "fp32", "cpu", "peft", "pip install peft"),
        (LORA, BARE, "bf16", "cuda", "peft", "pip install peft"),
        (E4M3_VALUES, A100, "bf16", "cuda", "sm_80) has no fp8 matrix units", "quantization.attention_values=float"),
    ],
)
def test_refusal(config: Any, machine: Machine, precision: str, device: str, reason: str, remedy: str) -> None:
    text = config.refusal(machine, precision, device)
    assert text is not None
    assert reason in text
    assert remedy in text


@pytest.mark.parametrize(
    ("config", "machine", "precision", "device"),
    [
        (INT8, T4, "fp16", "cuda"),
        (INT8, V100, "fp32", "cpu"),  # the GPU is not asked for
        (INT8, CPU, "bf16", "cpu"),
        (INT4, CPU, "fp32", "cpu"),
        (INT4, A100, "bf16", "cuda"),
        (NONE, Machine(), "fp32", "cpu"),
        (LORA, A100, "bf16", "cuda"),
        (E4M3_VALUES, CPU, "bf16", "cpu"),
        (E4M3_VALUES, H100, "bf16", "cuda"),
    ],
)
def test_no_refusal(config: Any, machine: Machine, precision: str, device: str) -> None:
    assert config.refusal(machine, precision, device) is None
