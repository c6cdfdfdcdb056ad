"""FlashAttention-3 and -4, through PyTorch's switch: SDPA's flash kernel is replaced by that of another package.

FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608) is for Hopper, its package `flash_attn_3`; FlashAttention-4 for
Hopper and Blackwell, its package `flash-attn-4`. `torch.nn.attention.activate_flash_attention_impl` puts either behind
`scaled_dot_product_attention`. The switch is one for the whole process: each call here sets it if another backend has
moved it. A compiled program holds the call and not the switch, so do not run compiled models of two of these kernels
(``sdpa`` with `kernel: flash` is one, too) in turns in one process.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar, Literal

import torch
import torch.nn.attention as switch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_efficient.attention.base import AttentionBackend, AttentionBackendConfig, Device, describe, oldest
from vit_efficient.attention.flash2 import autocast
from vit_efficient.errors import CapabilityError
from vit_efficient.machine import Machine

# name: (PyTorch's name, the module that it imports, first and last major compute capability, widest head)
KINDS: dict[str, tuple[str, str, int, int, int]] = {
    "flash3": ("FA3", "flash_attn_interface", 9, 9, 256),
    "flash4": ("FA4", "flash_attn.cute", 9, 10, 128),
}
# What these modules import in turn, and do not bring along: flash-attn 2.8 has flash_attn.cute and not its compiler.
BESIDE = {"flash4": "cutlass"}


class _FlashConfig(AttentionBackendConfig):
    name: str

    def build(self) -> AttentionBackend:
        return SwitchedFlash(self.name)

    def refusal(
        self, machine: Machine, precision: str, head_width: int | None = None, device: Device = "cuda"
    ) -> str | None:
        reason = self._reason(machine, precision, head_width, device)
        return None if reason is None else f"`attention: {self.name}` cannot run: {reason}. Take `attention=sdpa`."

    def _reason(self, machine: Machine, precision: str, head_width: int | None, device: Device) -> str | None:
        *_, first, last, widest = KINDS[self.name]
        gpu = oldest(machine)
        if device == "cpu" or gpu is None:
            where = "the model is on the CPU" if device == "cpu" else "there is no GPU that torch can use"
            return f"it runs on NVIDIA GPUs, and {where}"
        if not first <= gpu.capability[0] <= last:
            wanted = f"sm_{first}0" if first == last else f"sm_{first}0 to sm_{last}x"
            return f"it is for GPUs of {wanted}, and this is a {describe(gpu)}"
        if precision == "fp32":
            return "it computes in bf16 or fp16, and `quantization.precision` is fp32"
        if head_width is not None and head_width > widest:
            return f"it takes heads of width {widest} at most, and these are {head_width} wide"
        return missing(self.name)


class Flash3Config(_FlashConfig):
    """FlashAttention-3: half precision, sm_90."""

    name: Literal["flash3"] = "flash3"


class Flash4Config(_FlashConfig):
    """FlashAttention-4: half precision, sm_90 and sm_100."""

    name: Literal["flash4"] = "flash4"


def missing(name: str) -> str | None:
    """What is not installed that `name` needs, in words; or None."""
    implementation, module, *_ = KINDS[name]
    if not hasattr(switch, "activate_flash_attention_impl"):
        return f"this PyTorch ({torch.__version__}) has no switch for {implementation}"
    if implementation not in switch.list_flash_attention_impls():
        return f"this PyTorch ({torch.__version__}) knows {switch.list_flash_attention_impls()}, not {implementation}"
    package, _, inner = module.partition(".")
    found = importlib.util.find_spec(package) is not None and (not inner or _has(module))
    if not found:
        return f"the module {module} of its package is not installed"
    beside = BESIDE.get(name)
    absent = beside is not None and importlib.util.find_spec(beside) is None
    return f"{module} needs the module {beside}, which is not installed" if absent else None


def _has(module: str) -> bool:
    """Whether a submodule is there. Its package is imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the package itself does not import: built for another torch
        return False


class SwitchedFlash(AttentionBackend):
    """SDPA's flash kernel, switched to another implementation: exact attention in half precision, without bias, mask
    or dropout."""

    name: ClassVar[str] = "flash3/4"
    takes_bias: ClassVar[bool] = False

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = kind  # type: ignore[misc]  # in messages

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
        q_BHNE, k_BHNE, v_BHNE = autocast(q_BHNE), autocast(k_BHNE), autocast(v_BHNE)
        if (reason := self._refused(q_BHNE, v_BHNE, bias, mask, dropout)) is not None:
            raise CapabilityError(f"`attention: {self.kind}` cannot run: {reason}. Take `attention=sdpa`.")
        if torch.compiler.is_compiling():
            _activate_now(self.kind)
        else:
            activate(self.kind)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q_BHNE, k_BHNE, v_BHNE, scale=scale)

    def _refused(self, q: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float) -> str | None:
        if bias is not None or mask is not None:
            return "it takes no position bias and no mask, and this model has one"
        if dropout > 0:
            return f"it drops no attention weights, and this model's rate is {dropout:g}"
        if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes bf16 or fp16 on a GPU, and got {q.dtype} on {q.device.type}".replace("torch.", "")
        if v.shape[-1] != q.shape[-1]:
            return f"its queries and values must be equally wide, and these are {q.shape[-1]} and {v.shape[-1]}"
        return None


def activate(kind: str | None) -> None:
    """Set PyTorch's switch, if it stands elsewhere: ``flash3``, ``flash4``, or None for its own flash kernel.

    Raises:
        CapabilityError: the package is not there or does not import.
    """
    current: Any = getattr(switch, "current_flash_attention_impl", lambda: None)()
    wanted = None if kind is None else KINDS[kind][0]
    if current == wanted:
        return
    if wanted is None:
        if not hasattr(switch, "restore_flash_attention_impl"):
            raise CapabilityError(
                f"`attention: sdpa` cannot run: {current} was switched on in this process, and this PyTorch "
                f"({torch.__version__}) cannot switch back. Run the two in processes of their own."
            )
        switch.restore_flash_attention_impl()
        return
    assert kind is not None
    if (reason := missing(kind)) is not None:
        raise CapabilityError(f"`attention: {kind}` cannot run: {reason}. Take `attention=sdpa`.")
    try:
        switch.activate_flash_attention_impl(wanted)
    except (ImportError, RuntimeError) as error:  # built for another torch, or without the kernels that are wanted
        raise CapabilityError(f"`attention: {kind}` cannot run: {error}. Take `attention=sdpa`.") from error


@torch.compiler.assume_constant_result
def _activate_now(kind: str) -> bool:
    """`activate` while a compiler traces, which runs it then."""
    activate(kind)
    return True
