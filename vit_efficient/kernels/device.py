"""Which of the two an operator runs: the kernel, or the definition in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vit_efficient.errors import UserError
from vit_efficient.kernels.capability import lacks_fp8, lacks_triton
from vit_efficient.kernels.formats import format_of

_DEFINITIONS = ContextVar("vit_efficient_definitions", default=False)


@contextmanager
def by_definition() -> Iterator[None]:
    """While it lasts, operators run their definition on GPUs too, to hold kernels against. Integer attention does not:
    it takes its kernel as before."""
    token = _DEFINITIONS.set(True)
    try:
        yield
    finally:
        _DEFINITIONS.reset(token)


def runs_triton(x: Tensor) -> bool:
    """Whether kernels of this package run where `x` is."""
    return not _DEFINITIONS.get() and x.device.type == "cuda" and lacks_triton(x.device) is None


@torch.compiler.assume_constant_result
def runs_triton_constant(index: int) -> bool:
    """`runs_triton` on a GPU while a compiler traces, which follows no context variables: a constant of the program."""
    return not _DEFINITIONS.get() and lacks_triton(torch.device("cuda", index)) is None


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
