"""FlashAttention-3 and -4: where they are refused, and what with. Their kernels are tested where their packages are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.attention as switch
from pydantic import TypeAdapter
from torch import Tensor

from vit_efficient.attention import reference, switched_flash
from vit_efficient.attention.config import AttentionConfig
from vit_efficient.attention.sdpa import SdpaConfig
from vit_efficient.attention.switched_flash import Flash3Config, Flash4Config, activate, missing
from vit_efficient.errors import CapabilityError
from vit_efficient.machine import Gpu, Machine

A100 = Machine((Gpu("NVIDIA A100", (8, 0), 40 << 30),))
H200 = Machine((Gpu("NVIDIA H200", (9, 0), 140 << 30),))
B200 = Machine((Gpu("NVIDIA B200", (10, 0), 180 << 30),))


@pytest.mark.parametrize(
    ("config", "machine", "precision", "width", "device", "reason"),
    [
        (Flash3Config(), A100, "bf16", 64, "cuda", "it is for GPUs of sm_90, and this is a NVIDIA A100 (sm_80)"),
        (Flash3Config(), B200, "bf16", 64, "cuda", "it is for GPUs of sm_90"),
        (Flash4Config(), A100, "bf16", 64, "cuda", "it is for GPUs of sm_90 to sm_10x"),
        (Flash3Config(), H200, "fp32", 64, "cuda", "it computes in bf16 or fp16"),
        (Flash4Config(), B200, "bf16", 256, "cuda", "heads of width 128 at most, and these are 256"),
        (Flash3Config(), H200, "bf16", 64, "cpu", "the model is on the CPU"),
        (Flash3Config(), Machine(), "bf16", 64, "cuda", "there is no GPU that torch can use"),
    ],
)
def test_refusal(config: Any, machine: Machine, precision: str, width: int, device: Any, reason: str) -> None:
    said = config.refusal(machine, precision, width, device)
    assert said is not None
    assert said.startswith(f"`attention: {config.name}` cannot run: ")
    assert reason in said
    assert said.endswith("Take `attention=sdpa`.")


@pytest.mark.parametrize("name", ["flash3", "flash4"])
def test_a_package_that_is_not_there_is_named(name: str) -> None:
    reason = missing(name)
    if reason is None:
        pytest.skip(f"{name} is installed")
    assert switched_flash.KINDS[name][1] in reason
    config = TypeAdapter(AttentionConfig).validate_python({"name": name})
    assert reason in (config.refusal(H200, "bf16", 64) or "")
    with pytest.raises(CapabilityError, match=r"is not installed\. Take `attention=sdpa`"):
        activate(name)
    assert switch.current_flash_attention_impl() is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "it takes bf16 or fp16 on a GPU, and got float32 on cpu"),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, "no position bias and no mask"),
        ({"dropout": 0.1}, "this model's rate is 0.1"),
    ],
    ids=["cpu", "mask", "dropout"],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], reason: str) -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(CapabilityError, match=reason):
        Flash3Config().build().attend(q, q, q, scale=1.0, **options)


class Handle:
    removed = False

    def remove(self) -> None:
        self.removed = True


def test_the_switch_is_set_and_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """With implementations of our own registered in PyTorch's registry, in place of the packages'."""
    handles = {"FA3": Handle(), "FA4": Handle()}
    for name, handle in handles.items():
        monkeypatch.setitem(switch._registry._FLASH_ATTENTION_IMPLS, name, lambda handle=handle: handle)
    monkeypatch.setattr(switched_flash, "missing", lambda name: None)
    activate("flash3")
    assert switch.current_flash_attention_impl() == "FA3"
    activate("flash4")
    assert switch.current_flash_attention_impl() == "FA4"
    assert handles["FA3"].removed
    activate(None)
    assert switch.current_flash_attention_impl() is None
    assert handles["FA4"].removed


def inputs() -> tuple[Tensor, ...]:
    qkv = torch.randn(3, 2, 197, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return qkv.transpose(2, 3).unbind(0)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [Flash3Config(), Flash4Config()], ids=lambda config: config.name)
def test_output_on_a_gpu(config: Any) -> None:
    from vit_efficient.machine import detect

    if (reason := config.refusal(detect(), "bf16", 64)) is not None:
        pytest.skip(reason)
    q, k, v = inputs()
    y = config.build().attend(q, k, v, scale=0.125)
    wanted = reference.attend(q.double(), k.double(), v.double(), scale=0.125)
    assert (y - wanted).norm() < 1e-2 * wanted.norm()
    SdpaConfig(kernel="flash").build().attend(q, k, v, scale=0.125)
    assert switch.current_flash_attention_impl() is None
