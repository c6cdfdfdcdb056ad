"""How each form of a linear layer on codes is launched: tile, grid, descriptors, memory for what it returns.

Nothing here waits for the device, so launches can be captured in CUDA graphs. Shapes: M rows, K inputs, N outputs, B
batch, T tokens, H heads, E head width, P parts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vit_efficient.kernels.formats import format_of
from vit_efficient.kernels.linear.triton import linear_kernel
from vit_efficient.kernels.overlap import overlap, processors
from vit_efficient.kernels.rows import vector, with_rows
from vit_efficient.kernels.tuning import Shape, Tile, choose

ALIGNMENT = 16  # bytes, of what descriptors describe, and of what is asked for ahead of its use
PROMOTE = 128  # products that `full` fp8 sums leave to the matrix units before float32 takes over


@dataclass(frozen=True)
class Form:
    """What follows the product; the kernel's constants of these names."""

    layout: str = "rows"
    gelu: bool = False
    quant: str = "none"
    codes: str = "int8"
    heads: int = 1
    width: int = 1
    tokens: int = 1

    def name(self, residual: bool) -> str:
        """What tiles are kept under: `plain`, `gelu`, `gelu_quant`, `quant`, `residual`, `heads` or `heads_quant`."""
        parts = ["heads"] * (self.layout == "heads") + ["gelu"] * self.gelu + ["quant"] * (self.quant != "none")
        return "_".join(parts + ["residual"] * residual) or "plain"


@functools.cache
def _has_copy_engine(device: torch.device) -> bool:
    """Whether descriptors work: from sm_90, and in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def describable(x: Tensor) -> bool:
    """Whether a matrix can be described to the copy engine."""
    aligned = x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0
    return x.stride(1) == 1 and aligned and _has_copy_engine(x.device)


def fetchable(q_NK: Tensor) -> bool:
    """Whether codes can be asked for ahead of their use: without gaps, each row whole blocks of 16 bytes."""
    whole = q_NK.itemsize == 1 and q_NK.is_contiguous()
    return whole and q_NK.shape[1] % ALIGNMENT == 0 == q_NK.data_ptr() % ALIGNMENT


def launch(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    form: Form,
    fast: bool,
    out: Tensor,
    *,
    residual_MN: Tensor | None = None,
    gamma_N: Tensor | None = None,
    out_scale: Tensor | None = None,
    scales: Tensor | None = None,
    shift_N: Tensor | None = None,
    smooth_N: Tensor | None = None,
    reciprocal_N: Tensor | None = None,
    descriptors: bool | None = None,
) -> None:
    """Fill `out`, and `scales` where the form makes some.

    Args:
        descriptors: whether operands come through the copy engine; None: where that is possible.
    """
    q_MK, q_NK = with_rows(q_MK), with_rows(q_NK)
    (rows, inputs), outputs = q_MK.shape, q_NK.shape[0]
    fp8 = q_MK.dtype != torch.int8
    op = f"{operator(q_MK, fast)}.{form.name(residual_MN is not None)}"
    tile = choose(op, q_MK.device, Shape(rows, inputs, outputs))
    tile, step, head_block = fit(tile, form)
    if descriptors is None:
        descriptors = describable(q_MK) and describable(q_NK)
    store = descriptors and form.layout == "rows" and describable(out)
    chosen = format_of(form.codes)
    tiles = -(-rows // tile.block_m) * -(-outputs // step)
    part = [tile.block_m, tile.block_n // tile.parts]
    described_out = TensorDescriptor.from_tensor(out, part) if store else out
    through = store and residual_MN is not None and describable(residual_MN)
    programs = processors(q_MK.device, 3) * tile.programs
    alone = tiles <= programs and tile.parts == 1
    through = through and not alone
    added = TensorDescriptor.from_tensor(residual_MN, part) if through else residual_MN
    grid = (min(tiles, programs),)
    launched = overlap(q_MK.device)
    # A program of several tiles could ask for the first one's weights only; those of few rows are read once.
    early = alone and launched["OVERLAP"] and fetchable(q_NK)
    with torch.cuda.device_of(q_MK):
        linear_kernel[grid](
            TensorDescriptor.from_tensor(q_MK, [tile.block_m, tile.block_k]) if descriptors else q_MK,
            TensorDescriptor.from_tensor(q_NK, [tile.block_n, tile.block_k]) if descriptors else q_NK,
            scale_M1.contiguous(), scale_N1.contiguous(), vector(bias_N), added, vector(gamma_N), described_out,
            out_scale, vector(shift_N), vector(smooth_N), vector(reciprocal_N), scales,
            q_NK if early else None, rows, outputs, inputs, q_MK.stride(0), q_NK.stride(0),
            0 if residual_MN is None else residual_MN.stride(0), form.tokens,
            FP8=fp8, PROMOTE=min(PROMOTE, tile.block_k) if fp8 and not fast else 0,
            LAYOUT=form.layout, GELU=form.gelu, QUANT=form.quant, LARGEST=chosen.largest, INTEGER=chosen.is_integer,
            ROW_SCALES=scale_M1.numel() > 1, COLUMN_SCALES=scale_N1.numel() > 1,
            DESCRIPTORS=descriptors, STORE_DESCRIPTOR=store, EVEN_K=inputs % tile.block_k == 0,
            HEADS=form.heads, WIDTH=form.width, HEAD_BLOCK=head_block,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STEP_N=step, GROUP=tile.group,
            PARTS=tile.parts, RESIDUAL_DESCRIPTOR=through, ALONE=alone, **tile.options, enable_fp_fusion=False,
            **launched,
        )  # fmt: skip


def operator(q: Tensor, fast: bool) -> str:
    """The name that tiles are kept under: sums and operands of different kinds take different room."""
    if q.dtype in (torch.float16, torch.bfloat16):
        return "half_linear"
    return "int8_linear" if q.dtype == torch.int8 else "fp8_linear_fast" if fast else "fp8_linear"


def fit(tile: Tile, form: Form) -> tuple[Tile, int, int]:
    """A tile that suits a form, the columns from one tile to the next, and the block of a head.

    Where scales are made a head, a tile has whole heads: several, if their width is a power of two, else one, in a
    block of the next power of two. A wider tile takes more shared memory, so fewer programs share a multiprocessor.
    """
    if form.layout == "rows" or form.quant == "none":
        return tile, tile.block_n, 1
    block = max(16, 1 << (form.width - 1).bit_length())
    if block != form.width:
        return replace(tile, block_n=block, parts=1, programs=_programs(tile, block)), form.width, block
    columns = max(tile.block_n, block)
    parts = min(tile.parts, columns // block)
    return replace(tile, block_n=columns, parts=parts, programs=_programs(tile, columns)), columns, block


def _programs(tile: Tile, columns: int) -> int:
    """On each multiprocessor, where a tile has `columns` in place of its own."""
    return max(1, min(tile.programs, tile.programs * tile.block_n // columns))


def linear(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """(M, N) in `dtype`."""
    out = torch.empty((q_MK.shape[0], q_NK.shape[0]), dtype=dtype, device=q_MK.device)
    launch(q_MK, scale_M1, q_NK, scale_N1, bias_N, Form(gelu=gelu), fast, out)
    return out


def half_gelu(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """GELU of a layer in 16 bits, (M, N): codes without scales, summed up in float32."""
    out = torch.empty((x_MK.shape[0], weight_NK.shape[0]), dtype=x_MK.dtype, device=x_MK.device)
    one = _one(x_MK.device)
    launch(x_MK, one, weight_NK, one, bias_N, Form(gelu=True), True, out)
    return out


def _one(device: torch.device) -> Tensor:
    """A scale of 1; within a CUDA graph one of its own, as what is filled there is not before the graph runs."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return torch.ones(1, 1, device=device) if captured else _kept_one(device)


@functools.cache
def _kept_one(device: torch.device) -> Tensor:
    return torch.ones(1, 1, device=device)


def linear_quant(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    gelu: bool,
    out_scale: Tensor,
    codes: str,
    fast: bool,
    shift_N: Tensor | None = None,
    smooth_N: Tensor | None = None,
    reciprocal_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes (M, N) of the layer, less `shift_N` and divided by `smooth_N`, under one given scale; the scales of rows
    (M, 1). `reciprocal_N` is ``1 / smooth_N``."""
    rows, outputs = q_MK.shape[0], q_NK.shape[0]
    out = torch.empty((rows, outputs), dtype=format_of(codes).dtype, device=q_MK.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=q_MK.device)
    form = Form(gelu=gelu, quant="static", codes=codes)
    launch(
        q_MK, scale_M1, q_NK, scale_N1, bias_N, form, fast, out, out_scale=out_scale, scales=scales, shift_N=shift_N,
        smooth_N=smooth_N, reciprocal_N=reciprocal_N,
    )  # fmt: skip
    return out, scales


def linear_residual(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    residual_MN: Tensor,
    gamma_N: Tensor | None,
    fast: bool,
) -> Tensor:
    """(M, N) in the residual's dtype."""
    residual_MN = with_rows(residual_MN)
    out = torch.empty(residual_MN.shape, dtype=residual_MN.dtype, device=q_MK.device)
    operands = (q_MK, scale_M1, q_NK, scale_N1, bias_N)
    launch(*operands, Form(), fast, out, residual_MN=residual_MN, gamma_N=gamma_N)
    return out


def linear_heads(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    tokens: int,
    heads: int,
    parts: int,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """(P, B, H, T, E) in `dtype`."""
    width = q_NK.shape[0] // (parts * heads)
    out = torch.empty((parts, q_MK.shape[0] // tokens, heads, tokens, width), dtype=dtype, device=q_MK.device)
    form = Form(layout="heads", heads=heads, width=width, tokens=tokens)
    launch(q_MK, scale_M1, q_NK, scale_N1, bias_N, form, fast, out)
    return out


def linear_heads_quant(
    q_MK: Tensor,
    scale_M1: Tensor,
    q_NK: Tensor,
    scale_N1: Tensor,
    bias_N: Tensor | None,
    tokens: int,
    heads: int,
    parts: int,
    codes: str,
    scale_P: Tensor | None,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    """Codes (P, B, H, T, E) and scales (P, B, H, T, 1)."""
    width = q_NK.shape[0] // (parts * heads)
    shape = (parts, q_MK.shape[0] // tokens, heads, tokens)
    out = torch.empty((*shape, width), dtype=format_of(codes).dtype, device=q_MK.device)
    scales = torch.empty((*shape, 1), dtype=torch.float32, device=q_MK.device)
    quant = "token" if scale_P is None else "static"
    form = Form(layout="heads", quant=quant, codes=codes, heads=heads, width=width, tokens=tokens)
    launch(q_MK, scale_M1, q_NK, scale_N1, bias_N, form, fast, out, out_scale=scale_P, scales=scales)
    return out, scales
