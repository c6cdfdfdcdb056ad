"""fp8 attention with incoherent processing on a GPU: what `reference.attend` defines, by the shared kernels.

The rotation is a product with a matrix of +-1 on the matrix units, in the kernels that quantize: queries where they are
attended with, keys in the kernel before. It costs as much as one more step over P keys.

Shapes as in `reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vit_efficient.kernels.attention_launch import attend as launch
from vit_efficient.kernels.attention_launch import prepare
from vit_efficient.kernels.fp8_attention import reference


def attend(
    q_BHNE: Tensor,
    k_BHME: Tensor,
    v_BHMF: Tensor,
    scale: float,
    rotated: bool,
    values: str,
    out_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.attend` as (B, N, H, F) memory."""
    rotation = reference.rotation(q_BHNE.shape[-1], q_BHNE.device, q_BHNE.dtype) if rotated else None
    keys, v_BHMF, v_scales = prepare(
        k_BHME.to(q_BHNE.dtype), v_BHMF, keys="block", k_scale=None, values="fp8" if values == "fp8" else "as_is",
        v_scale=None, integer=False, rotation=rotation, dtype=v_BHMF.dtype,
    )  # fmt: skip
    assert keys is not None
    return launch(
        q_BHNE, None, keys, v_BHMF, v_scales, scale=scale, rotation=rotation, out_scale=out_scale, dtype=dtype
    )  # fmt: skip
