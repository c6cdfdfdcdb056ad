"""fp8 attention in a model: queries and keys rotated and in e4m3, softmax in floating point.

`Fp8Attend` takes the place of the attention backend, as `int8_attention.Int8Attend` does. The arithmetic is
`kernels.fp8_attention`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vit_efficient.kernels.fp8_attention.op import fp8_attend, fp8_attention
from vit_efficient.kernels.fp8_attention.reference import Values


class Fp8Attend(nn.Module):
    """An attention backend that multiplies queries and keys in e4m3, with scales chosen in each forward.

    In training and in evaluation the same arithmetic; gradients are straight-through.

    Args:
        values: how values are multiplied: as they are (``float``), or in e4m3 like the attention weights (``fp8``).
    """

    name: ClassVar[str] = "fp8"
    takes_bias: ClassVar[bool] = True
    form: ClassVar[str] = "fp8"  # of the codes that `attend_direct` can end in
    direct: ClassVar[bool] = True  # as `Int8Attend.direct`
    hands_codes: ClassVar[bool] = False  # queries and keys are rotated before they are quantized

    def __init__(self, values: Values = "float") -> None:
        super().__init__()
        self.values = values
        self.plain: Any = None  # the backend in whose place it stands

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
        """As `attention.base.AttentionBackend.attend`."""
        extras: dict[str, Any] = {"bias": bias, "mask": mask, "dropout": dropout}
        return fp8_attention(q_BHNE, k_BHNE, v_BHNE, scale=scale, values=self.values, **extras)

    def attend_direct(
        self,
        operands: list[Tensor],
        rows: list[Tensor | None],
        *,
        scale: float,
        out_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """As `Int8Attend.attend_direct`; operands are floating point, and `rows` None."""
        q_BHNE, k_BHNE, v_BHNE = operands
        return fp8_attend(q_BHNE, k_BHNE, v_BHNE, scale=scale, values=self.values, out_scale=out_scale, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.values} values"
