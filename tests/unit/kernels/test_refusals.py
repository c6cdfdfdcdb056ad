"""fp8 codes on GPUs without fp8 units: refused with the reason, before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vit_efficient.errors import UserError
from vit_efficient.kernels import capability
from vit_efficient.kernels.layernorm_quant import op as norms
from vit_efficient.kernels.linear import op as linear
from vit_efficient.kernels.quantize import op as quantization

EPS = 1e-6
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, str], Any]] = {
    "quantize": lambda x, one, q, form: quantization._quantize._init_fn(x, form, None, None, None, None),
    "layernorm": lambda x, one, q, form: norms._layernorm_quant._init_fn(x, None, None, EPS, form, one),
    "add_layernorm": lambda x, one, q, form: norms._add_layernorm_quant._init_fn(
        x, x, None, None, None, EPS, form, None
    ),
    "linear": lambda x, one, q, form: linear._linear_quant._init_fn(
        q, one, q, one, None, True, one, None, None, None, form, False
    ),
    "heads": lambda x, one, q, form: linear._linear_heads_quant._init_fn(
        q, one, q, one, None, 4, 1, 2, form, None, False
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_fp8_codes_on_ampere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "compute_capability", lambda index: (8, 0))
    monkeypatch.setattr(capability, "has_triton", lambda: True)
    with FakeTensorMode():
        x, one = torch.empty(4, 8, device="cuda"), torch.empty(1, 1, device="cuda")
        codes = torch.empty(4, 8, dtype=torch.int8, device="cuda")
        with pytest.raises(UserError, match="sm_80 has no fp8 matrix units"):
            FORMS[name](x, one, codes, "fp8")


@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_is_none(name: str) -> None:
    x, one = torch.zeros(4, 8), torch.ones(1, 1)
    make = partial(FORMS[name], x, one, torch.zeros(4, 8, dtype=torch.int8))
    make("int8")
    with pytest.raises(ValueError, match="int8, int4, fp8"):
        make("int3")
