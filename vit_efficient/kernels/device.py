"""Which of the two an operator runs: the kernel, or the definition in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from vit_efficient.errors import UserError
from vit_efficient.kernels.capability import lacks_fp8, lacks_triton
from vit_efficient.kernels.formats import format_of


def runs_triton(x: Tensor) -> bool:
    """Whether kernels of this package run where `x` is."""
    return x.device.type == "cuda" and lacks_triton(x.device) is None


def require_fp8(x: Tensor) -> None:
    """Refuse fp8 products on GPUs without units for them.

    Raises:
        UserError: `x` is on such a GPU.
    """
    if x.device.type == "cuda" and (why := lacks_fp8(x.device)) is not None:
        raise UserError(f"fp8 linear layers were asked for, but {why} Use quantization=int8 there.")


def check_form(form: str, x: Tensor) -> None:
    """See that codes of a form can be made where `x` is; none are made that the device could not multiply.

    Raises:
        UserError: fp8 codes on a GPU without units for them.
        ValueError: there is no such form.
    """
    if not format_of(form).is_integer:
        require_fp8(x)
