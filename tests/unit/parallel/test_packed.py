"""What torch 2.11 does to packed weights, undone; with later versions there is nothing to undo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from vit_efficient.parallel.packed import _gathered_as_they_are, bytes_as_they_are


class Of211:
    """Takes the policy's dtype for every parameter, as torch 2.11 does."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.orig_dtype: Any = dtype
        self.param_dtype: torch.dtype | None = None

    def init_dtype_attrs(self, dtype: torch.dtype) -> None:
        self.param_dtype = dtype


@pytest.mark.parametrize(
    ("dtype", "gathered"), [(torch.uint8, None), (torch.int8, None), (torch.float32, torch.bfloat16)]
)
def test_bytes_are_never_gathered_as_numbers(dtype: torch.dtype, gathered: torch.dtype | None) -> None:
    class Sharded(Of211):
        pass

    for _ in range(2):  # a second time changes nothing
        _gathered_as_they_are(Sharded)
    one = Sharded(dtype)
    one.init_dtype_attrs(torch.bfloat16)
    assert one.param_dtype == gathered


def test_shards_of_integers_are_frozen_while_it_lasts() -> None:
    names: Any = _fsdp_param
    before = names.nn
    with bytes_as_they_are():
        assert not names.nn.Parameter(torch.zeros(3, dtype=torch.uint8)).requires_grad
        assert names.nn.Parameter(torch.zeros(3)).requires_grad
        assert not names.nn.Parameter(torch.zeros(3), requires_grad=False).requires_grad
    assert names.nn is before
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(torch.zeros(3, dtype=torch.uint8))
