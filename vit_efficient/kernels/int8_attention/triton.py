"""Mixed-precision attention on a GPU: what `reference.attend` defines, by the shared kernels.

Queries are quantized where they are attended with. Keys, and values that are to be quantized, take a kernel of their
own before it, which moves 3 bytes a key's element (5 more a value's): under a tenth of the time from 577 tokens on, and
nothing where the projection's kernel puts out codes.

Shapes as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.attention_launch import Codes, prepare
from vit_efficient.kernels.attention_launch import attend as launch

VALUES = {"float": "as_is", "fp8": "fp8"}


def attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
    values: str,
    keys: str,
    out_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.attend` as (B, N, H, F) memory."""
    given = k_BHME.dtype == torch.int8
    form = "codes" if given else keys if k_scale is None else "given"
    made, v_BHMF, v_scales = prepare(
        k_BHME, v_BHMF, keys=form, k_scale=k_scale, values=value_form(values, v_BHMF, v_scale), v_scale=v_scale,
        integer=True, rotation=None, dtype=dtype if v_BHMF.dtype == torch.int8 else v_BHMF.dtype,
    )  # fmt: skip
    k = made if made is not None else _codes(k_BHME, k_scale)
    return launch(
        q_BHNE, q_scale, k, v_BHMF, v_scales, scale=scale, rotation=None, out_scale=out_scale, dtype=dtype
    )  # fmt: skip


def value_form(values: str, v_BHMF: Tensor, v_scale: Tensor | None) -> str:
    """What `operands_kernel` is to do with the values."""
    if values != "int8":
        return VALUES[values]
    if v_BHMF.dtype == torch.int8:
        return "codes"
    return "token" if v_scale is None else "given"


def _codes(k_BHME: Tensor, k_scale: Tensor | None) -> Codes:
    """Keys that are codes already; one scale in all counts as one a block."""
    assert k_scale is not None, "codes have a scale"
    k_BHME = k_BHME if k_BHME.stride(-1) == 1 else k_BHME.contiguous()
    if k_scale.numel() == 1:
        return Codes(k_BHME, k_scale.reshape(1).as_strided((1, 1, 1), (0, 0, 0)), by_token=False)
    return Codes(k_BHME, k_scale.squeeze(-1), by_token=True)
