"""FlashAttention-2 through the flash-attn package (Dao, 2023, arXiv:2307.08691)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vit_efficient.attention.base import AttentionBackend, AttentionBackendConfig, Device, describe, oldest
from vit_efficient.errors import CapabilityError
from vit_efficient.machine import Machine

MAX_HEAD_WIDTH = 256
INSTALL = (
    "install it (`pip install flash-attn --no-build-isolation`; it compiles, and needs torch and nvcc), "
    "or take `attention=sdpa`"
)


class Flash2Config(AttentionBackendConfig):
    """FlashAttention-2, from the `flash-attn` package: half precision, sm_80 or newer."""

    name: Literal["flash2"] = "flash2"

    def build(self) -> AttentionBackend:
        return Flash2Backend()

    def refusal(
        self, machine: Machine, precision: str, head_width: int | None = None, device: Device = "cuda"
    ) -> str | None:
        reason = self._reason(machine, precision, head_width, device)
        return None if reason is None else f"`attention: flash2` cannot run: {reason}."

    def _reason(self, machine: Machine, precision: str, head_width: int | None, device: Device) -> str | None:
        gpu = oldest(machine)
        if device == "cpu" or gpu is None:
            where = "the model is on the CPU" if device == "cpu" else "there is no GPU that torch can use"
            return f"FlashAttention-2 runs on NVIDIA GPUs from sm_80 on, and {where}. Take `attention=sdpa`"
        if gpu.capability < (8, 0):
            return (
                f"FlashAttention-2 needs a GPU of sm_80 (A100) or newer, and this is a {describe(gpu)}. "
                "Take `attention=sdpa`"
            )
        if precision == "fp32":
            return (
                "FlashAttention-2 computes in bf16 or fp16, and `quantization.precision` is fp32. "
                "Take `quantization.precision=bf16`, or `attention=sdpa`"
            )
        if head_width is not None and head_width > MAX_HEAD_WIDTH:
            return (
                f"FlashAttention-2 takes heads of width {MAX_HEAD_WIDTH} at most, and these are {head_width} wide. "
                "Take `attention=sdpa`"
            )
        if machine.version("flash-attn") is None:
            return f"the flash-attn package is not installed: {INSTALL}"
        return None


class Flash2Backend(AttentionBackend):
    """`flash_attn_func`: exact attention in half precision, without bias or mask."""

    name: ClassVar[str] = "flash2"
    takes_bias: ClassVar[bool] = False

    def __init__(self) -> None:
        # Looked for here and missed only when used: a recipe can be built and counted on a machine without GPU, and
        # the compiler finds no import inside `attend`.
        self._function: Callable[..., Tensor] | None = None
        self._missing = ""
        try:
            from flash_attn import flash_attn_func
        except ImportError as error:  # not installed, or built for another torch ("undefined symbol")
            self._missing = str(error)
        else:
            self._function = flash_attn_func

    def attend(
        self,
        q_BHNE: Tensor,
        k_BHNE: Tensor,
        v_BHNE: Tensor,
        *,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        scale: float,
        dropout: float = 0.0,
    ) -> Tensor:
        if bias is not None or mask is not None:
            raise CapabilityError(
                "`attention: flash2` cannot run: it takes no position bias and no mask, and this model has one. "
                "Take `attention=sdpa`."
            )
        q_BHNE, k_BHNE, v_BHNE = autocast(q_BHNE), autocast(k_BHNE), autocast(v_BHNE)
        if not q_BHNE.is_cuda or q_BHNE.dtype not in (torch.float16, torch.bfloat16):
            raise CapabilityError(
                f"`attention: flash2` cannot run: it takes bf16 or fp16 on a GPU, and got {q_BHNE.dtype} on "
                f"{q_BHNE.device.type}. Take `quantization.precision=bf16` on a GPU, or `attention=sdpa`."
            )
        if v_BHNE.shape[-1] != q_BHNE.shape[-1]:
            raise CapabilityError(
                f"`attention: flash2` cannot run: its queries and values must be equally wide, and this model's are "
                f"{q_BHNE.shape[-1]} and {v_BHNE.shape[-1]}. Take `attention=sdpa`."
            )
        if self._function is None:
            raise CapabilityError(
                f"`attention: flash2` cannot run: flash-attn does not import ({self._missing}): {INSTALL}."
            )
        try:
            y_BNHE = self._function(
                q_BHNE.transpose(1, 2),
                k_BHNE.transpose(1, 2),
                v_BHNE.transpose(1, 2),
                dropout_p=dropout,
                softmax_scale=scale,
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a wheel may have been built without some head widths or architectures
            raise CapabilityError(
                f"`attention: flash2` cannot run: flash-attn refused {q_BHNE.dtype}, heads of width "
                f"{q_BHNE.shape[-1]}: {str(error).splitlines()[0]}. Take `attention=sdpa`."
            ) from error
        return y_BNHE.transpose(1, 2)


def autocast(x: Tensor) -> Tensor:
    """What PyTorch's own attention does under autocast: float32 goes down to autocast's dtype."""
    if x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
