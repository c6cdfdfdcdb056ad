"""(Residual add +) LayerNorm (+ quantization) in one pass: a program holds its rows from the load to the codes.

Shapes: M rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vit_efficient.kernels.device_functions import quantize_block, wait_for_previous
from vit_efficient.kernels.formats import Format, format_of
from vit_efficient.kernels.overlap import overlap
from vit_efficient.kernels.rows import row_launch, vector, with_rows


@triton.jit
def _kernel(
    x, residual, gamma, weight, bias, given, y, scales, new, M, D, x_stride, residual_stride, eps,
    QUANT: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_previous(OVERLAP)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    used = column < D
    there = (row < M)[:, None] & used[None, :]
    # Loaded here and used at the end, so that nothing waits for them.
    factor, added = weight, bias
    if weight is not None:
        factor = tl.load(weight + column, mask=used, other=0.0).to(tl.float32)
    if bias is not None:
        added = tl.load(bias + column, mask=used, other=0.0).to(tl.float32)
    r = tl.load(x + row[:, None] * x_stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        if gamma is not None:
            r = tl.load(gamma + column, mask=used, other=0.0).to(tl.float32)[None, :] * r
        old = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=there, other=0.0)
        stored = (old.to(tl.float32) + r).to(new.dtype.element_ty)
        tl.store(new + row[:, None] * D + column[None, :], stored, mask=there)
        r = stored.to(tl.float32)
    size = tl.full((), 1.0, tl.float32) * D
    mean = tl.div_rn(tl.sum(r, 1), size)
    centred = tl.where(there, r - mean[:, None], 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, 1), size)
    inverse = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    out = centred * inverse[:, None]
    if weight is not None:
        out *= factor[None, :]
    if bias is not None:
        out += added[None, :]
    if QUANT == "none":
        tl.store(y + row[:, None] * D + column[None, :], out.to(y.dtype.element_ty), mask=there)
    else:
        codes, scale = quantize_block(out, given, QUANT, LARGEST, INTEGER)
        tl.store(y + row[:, None] * D + column[None, :], codes, mask=there)
        tl.store(scales + row, scale, mask=row < M)


def _launch(
    x_MD: Tensor,
    residual_MD: Tensor | None,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    y_MD: Tensor,
    scales_M1: Tensor | None,
    chosen: Format | None,
    scale: Tensor | None,
) -> Tensor | None:
    """Fills `y_MD` and `scales_M1`; gives the new residual, if there was one."""
    rows, columns = x_MD.shape
    x_MD = with_rows(x_MD)
    new_MD = None
    if residual_MD is not None:
        residual_MD = with_rows(residual_MD)
        new_MD = torch.empty((rows, columns), dtype=residual_MD.dtype, device=x_MD.device)
    quant = "none" if chosen is None else "token" if scale is None else "static"
    plan = row_launch(rows, columns, x_MD.device)
    with torch.cuda.device_of(x_MD):
        _kernel[(plan.programs,)](
            x_MD, residual_MD, vector(gamma_D), vector(weight_D), vector(bias_D), scale, y_MD, scales_M1, new_MD,
            rows, columns, x_MD.stride(0), 0 if residual_MD is None else residual_MD.stride(0), eps,
            QUANT=quant, LARGEST=chosen.largest if chosen else 0, INTEGER=chosen.is_integer if chosen else False,
            ROWS=plan.rows, BLOCK=plan.block, num_warps=plan.warps, enable_fp_fusion=False, **overlap(x_MD.device),
        )  # fmt: skip
    return new_MD


def _codes(x_MD: Tensor, form: str) -> tuple[Format, Tensor, Tensor]:
    chosen = format_of(form)
    codes = torch.empty(x_MD.shape, dtype=chosen.dtype, device=x_MD.device)
    return chosen, codes, torch.empty((x_MD.shape[0], 1), dtype=torch.float32, device=x_MD.device)


def layernorm(x_MD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """`reference.layernorm` of a matrix."""
    y_MD = torch.empty(x_MD.shape, dtype=dtype, device=x_MD.device)
    _launch(x_MD, None, None, weight_D, bias_D, eps, y_MD, None, None, None)
    return y_MD


def layernorm_quant(
    x_MD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None, eps: float, form: str, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.layernorm_quant` of a matrix."""
    chosen, codes, scales = _codes(x_MD, form)
    _launch(x_MD, None, None, weight_D, bias_D, eps, codes, scales, chosen, scale)
    return codes, scales


def add_layernorm(
    x_MD: Tensor,
    residual_MD: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`reference.add_layernorm` of matrices."""
    y_MD = torch.empty(x_MD.shape, dtype=dtype, device=x_MD.device)
    new_MD = _launch(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, y_MD, None, None, None)
    assert new_MD is not None
    return y_MD, new_MD


def add_layernorm_quant(
    x_MD: Tensor,
    residual_MD: Tensor,
    gamma_D: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    form: str,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.add_layernorm_quant` of matrices."""
    chosen, codes, scales = _codes(x_MD, form)
    new_MD = _launch(x_MD, residual_MD, gamma_D, weight_D, bias_D, eps, codes, scales, chosen, scale)
    assert new_MD is not None
    return codes, scales, new_MD
