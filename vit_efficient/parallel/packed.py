"""Two things that FSDP2 of torch 2.11 does to packed weights, undone. Later versions leave integers alone.

It makes every shard a trained parameter before it freezes those that are frozen: bytes cannot be trained, and 4-bit and
8-bit layers are refused ("only Tensors of floating point dtype can require gradients"). And mixed precision gathers
bytes as numbers of its dtype, which a kernel would read as other bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


def _parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
    trainable = data.is_floating_point() or data.is_complex()
    return nn.Parameter(data, requires_grad=requires_grad and trainable)


@contextmanager
def bytes_as_they_are() -> Iterator[None]:
    """While it lasts, shards of integers that FSDP2 makes are frozen; and they are never gathered as anything else."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    names: Any = _fsdp_param
    before, names.nn = names.nn, SimpleNamespace(Module=nn.Module, Parameter=_parameter)
    _gathered_as_they_are(names.FSDPParam)
    try:
        yield
    finally:
        names.nn = before


def _gathered_as_they_are(sharded: Any) -> None:
    original = sharded.init_dtype_attrs
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def init_dtype_attrs(self: Any, *policy: Any) -> None:
        original(self, *policy)
        if not self.orig_dtype.is_floating_point:
            self.param_dtype = None

    sharded.init_dtype_attrs = init_dtype_attrs
