"""PyTorch's scaled_dot_product_attention, with its kernel measured, chosen by PyTorch, or forced."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext, suppress
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_efficient.attention.base import AttentionBackend, AttentionBackendConfig, Device, describe, oldest
from vit_efficient.attention.choice import KERNELS, LARGEST_BATCH, Call, choose, choose_constant
from vit_efficient.attention.switched_flash import activate
from vit_efficient.errors import CapabilityError
from vit_efficient.machine import Machine

Kernel = Literal["auto", "flash", "cudnn", "efficient", "math"]

DTYPES = {
    torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64",
    torch.bool: "bool",
}  # fmt: skip
NO_KERNEL = ("No available kernel", "No viable backend")
# Some reasons PyTorch gives once in a process: then they stand among the warnings of the first refusal.
UNSAID = "PyTorch has no such kernel for these tensors; its first warning of this run says why"
REMEDY = "Take `attention.kernel=auto` (the fastest that can) or `math` (runs everywhere)."


class SdpaConfig(AttentionBackendConfig):
    """PyTorch's `scaled_dot_product_attention`."""

    name: Literal["sdpa"] = "sdpa"
    kernel: Kernel = Field(
        "auto",
        description="Which of PyTorch's kernels must do it. `auto`: on a GPU the fastest, measured once for each kind "
        "of call and kept on disk; on a CPU, and where algorithms must be deterministic, what PyTorch chooses.",
    )

    def build(self) -> AttentionBackend:
        return SdpaBackend(self.kernel)

    def refusal(
        self, machine: Machine, precision: str, head_width: int | None = None, device: Device = "cuda"
    ) -> str | None:
        if self.kernel in ("auto", "math"):
            return None
        reason = self._reason(machine, precision, head_width, device)
        return None if reason is None else f"`attention.kernel={self.kernel}` cannot run: {reason}. {REMEDY}"

    def _reason(self, machine: Machine, precision: str, head_width: int | None, device: Device) -> str | None:
        if device == "cpu":
            return None if self.kernel == "flash" else f"PyTorch has the {self.kernel} kernel for NVIDIA GPUs only"
        gpu = oldest(machine)
        if gpu is None:
            return "there is no GPU that torch can use"
        if self.kernel == "efficient":
            return None
        if gpu.capability < (8, 0):
            return f"it needs a GPU of sm_80 or newer, and this is a {describe(gpu)}"
        if precision == "fp32":
            return "it computes in bf16 or fp16, and `quantization.precision` is fp32"
        if head_width is not None and head_width > 256:
            return f"its heads may be 256 wide at most, and these are {head_width}"
        return None


class SdpaBackend(AttentionBackend):
    """`F.scaled_dot_product_attention`; a forced kernel either does it or raises CapabilityError."""

    name: ClassVar[str] = "sdpa"
    takes_bias: ClassVar[bool] = True

    def __init__(self, kernel: Kernel = "auto") -> None:
        self.kernel = kernel

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
        attn_mask = merge(bias, mask, q_BHNE.dtype)
        if q_BHNE.is_cuda and self.kernel in ("auto", "flash") and not torch.compiler.is_compiling():
            activate(None)  # PyTorch's own flash kernel, whatever another model has switched on
        if self.kernel == "auto":
            kernel = _fastest(q_BHNE, k_BHNE, v_BHNE, attn_mask, dropout)
            with nullcontext() if kernel is None else sdpa_kernel(_first(kernel), set_priority=True):
                return F.scaled_dot_product_attention(
                    q_BHNE, k_BHNE, v_BHNE, attn_mask=attn_mask, dropout_p=dropout, scale=scale
                )
        try:
            with sdpa_kernel(KERNELS[self.kernel]):
                return F.scaled_dot_product_attention(
                    q_BHNE, k_BHNE, v_BHNE, attn_mask=attn_mask, dropout_p=dropout, scale=scale
                )
        except RuntimeError as error:
            if not str(error).startswith(NO_KERNEL):
                raise
            reason = self._why_not(q_BHNE, k_BHNE, v_BHNE, attn_mask, dropout)
            raise CapabilityError(f"`attention.kernel={self.kernel}` cannot run: {reason}. {REMEDY}") from error

    def _why_not(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout: float) -> str:
        """PyTorch's own reasons, which it gives as warnings when it is made to refuse."""
        with warnings.catch_warnings(record=True) as caught, sdpa_kernel(KERNELS[self.kernel]):
            warnings.simplefilter("always")
            with suppress(RuntimeError):  # the same refusal again, now with its reasons in `caught`
                F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        said = [re.sub(r"\s*\(Triggered internally.*", "", str(w.message), flags=re.DOTALL).strip() for w in caught]
        # Each kernel's reasons follow a headline of its own; the other kernels were only switched off.
        reasons = [s for s in said if not s.endswith("not used because:") and "been runtime disabled" not in s]
        asked = f"{q.dtype} on {q.device.type}, shape {tuple(q.shape)}".replace("torch.", "")
        return f"{' '.join(dict.fromkeys(reasons)) or UNSAID} ({asked})"


def _first(kernel: str) -> list[SDPBackend]:
    """All kernels in order: the chosen one, then the others, should this very call (its strides) be none for it."""
    return [KERNELS[kernel], *(other for name, other in KERNELS.items() if name != kernel)]


def _fastest(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout: float) -> str | None:
    """The fastest kernel for a call on a GPU; None where PyTorch shall choose."""
    if not q.is_cuda or torch.are_deterministic_algorithms_enabled():
        return None
    compiling = torch.compiler.is_compiling()
    if not torch.compiler.is_dynamo_compiling() and isinstance(q, FakeTensor):
        return None  # exported: the program is for other machines too
    autocast = torch.is_autocast_enabled("cuda") and q.dtype == torch.float32
    dtype = torch.get_autocast_dtype("cuda") if autocast else q.dtype
    fields = (
        batch_of(q) if compiling else q.shape[0],
        q.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        v.shape[3],
        DTYPES[dtype],
        "" if attn_mask is None else DTYPES[attn_mask.dtype],
        dropout > 0,
        torch.is_grad_enabled() and q.requires_grad,
    )
    index = q.device.index
    return choose_constant(index, *fields) if compiling else choose(Call(*fields), torch.device("cuda", index))


def takes_cudnn(backend: AttentionBackend, q_BHNE: Tensor, k_BHNE: Tensor, v_BHNE: Tensor) -> bool:
    """Whether this backend would have cuDNN do a call without bias, mask and dropout, because it is the fastest."""
    if not isinstance(backend, SdpaBackend) or backend.kernel != "auto":
        return False
    return _fastest(q_BHNE, k_BHNE, v_BHNE, None, 0.0) == "cudnn"


def batch_of(q: Tensor) -> int:
    """The batch that a compiler traces for: the one that the program is for, or the largest where it serves any."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy; a compiler has done so

    return q.shape[0] if has_static_value(q.shape[0]) else LARGEST_BATCH


def merge(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One tensor that holds an additive bias and a boolean mask, as `scaled_dot_product_attention` wants it."""
    if bias is None:
        return mask
    bias = bias.to(dtype)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))
