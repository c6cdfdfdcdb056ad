"""How attention kernels are launched: codes of keys and values where they have to be made first, tile, descriptors.

Nothing here waits for the device, so launches can be captured in CUDA graphs. Kernels run on their operands' device,
whichever is the current one. Legend as in `attention_kernel`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vit_efficient.kernels import attention_values
from vit_efficient.kernels.attention_kernel import attend_kernel
from vit_efficient.kernels.attention_operands import operands_kernel
from vit_efficient.kernels.fp8_linear.reference import FORMAT
from vit_efficient.kernels.tuning import Shape, Tile, choose

ALIGNMENT = 16  # bytes, of what descriptors describe
REGISTERS = 65536  # of a multiprocessor, on every GPU from sm_80
MOST_REGISTERS = 255  # of a thread


@dataclass(frozen=True)
class Codes:
    """One operand as codes: `scale` is (B, H, N) with a scale a token, else (B, H, C) with one a block of keys."""

    codes: Tensor
    scale: Tensor
    by_token: bool


def power_of_two(number: int, least: int) -> int:
    """The smallest power of two that is neither below `number` nor below `least`."""
    return max(least, 1 << max(0, number - 1).bit_length())


def pitched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Empty, of a one-byte type; its rows (last dimension) lie a multiple of `ALIGNMENT` bytes apart."""
    return torch.empty((*shape[:-1], -(-shape[-1] // ALIGNMENT) * ALIGNMENT), dtype=dtype, device=device)[
        ..., : shape[-1]
    ]


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether descriptors work: from sm_90, and in the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def describable(x: Tensor) -> bool:
    """Whether a tensor can be described to the copy engine."""
    steps = [stride * x.element_size() % ALIGNMENT for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % ALIGNMENT == 0 and not any(steps)
    return x.stride(-1) == 1 and aligned and has_copy_engine(x.device)


def prepare(
    k_BHME: Tensor,
    v_BHMF: Tensor,
    *,
    keys: str,
    k_scale: Tensor | None,
    values: str,
    v_scale: Tensor | None,
    integer: bool,
    rotation: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Codes | None, Tensor, Tensor | None]:
    """Run `operands_kernel`: keys as codes (None for the form ``codes``), values as wanted, and the values' scales.

    Args:
        keys: form of the keys, the kernel's `K_FORM`.
        values: form of the values, its `V_FORM`.
        integer: keys become int8; else e4m3.
        rotation: R (E, P) in the dtype of the keys, or None.
        dtype: of the values, where they are made anew and not in e4m3.
    """
    batch, heads, tokens, width = k_BHME.shape
    device, v_width = k_BHME.device, v_BHMF.shape[-1]
    blocks = -(-tokens // attention_values.BLOCK)
    width_codes = width if rotation is None else rotation.shape[1]
    codes = scales = v_scales = None
    if keys != "codes":
        codes = pitched((batch, heads, tokens, width_codes), torch.int8 if integer else FORMAT, device)
        scales = torch.empty((batch, heads, tokens if keys == "token" else blocks), device=device)
    made = v_BHMF
    if values == "fp8":
        made = pitched((batch, heads, v_width, tokens), FORMAT, device).transpose(-2, -1)
        v_scales = torch.empty((batch, heads, blocks), device=device)
    elif values != "as_is":
        made = torch.empty((batch, heads, tokens, v_width), dtype=dtype, device=device)
    if keys != "codes" or values != "as_is":
        rows = (0, 0, 0) if v_scale is None or v_scale.numel() == 1 else v_scale.stride()[:3]
        with torch.cuda.device_of(k_BHME):
            operands_kernel[(batch * heads, blocks)](
                k_BHME, k_scale, codes, scales, v_BHMF, v_scale, made, v_scales, rotation, heads, tokens,
                *k_BHME.stride(), *(k_BHME if codes is None else codes).stride()[:3],
                *v_BHMF.stride(), *rows, *made.stride(),
                WIDTH_K=width, WIDTH_CODES=width_codes, WIDTH_V=v_width,
                BLOCK_E=power_of_two(width_codes, 32), BLOCK_F=power_of_two(v_width, 16),
                K_FORM=keys, LARGEST=127 if integer else 448, INTEGER=integer,
                ROTATED=0 if rotation is None else width_codes,
                SMALLEST=2.0**-126 if integer else attention_values.SMALLEST_SCALE, V_FORM=values,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    ready = None if codes is None or scales is None else Codes(codes, scales, keys == "token")
    return ready, made, v_scales


def steps(keys: int, block: int, narrowest: int) -> tuple[bool, bool, int]:
    """Whether there are whole blocks of keys, whether a half follows, and the width of the masked step after it."""
    rest = keys % block
    half = block // 2 >= narrowest and rest >= block // 2
    rest -= block // 2 if half else 0
    return keys >= block, half, power_of_two(rest, narrowest) if rest else 0


def registers(tile: Tile) -> int | None:
    """A cap that lets `tile.programs` programs share a multiprocessor; None: there is no need for one."""
    most = REGISTERS // (tile.programs * tile.warps * 32) // 8 * 8
    return most if most < MOST_REGISTERS else None


def attend(
    q_BHNE: Tensor,
    q_scale: Tensor | None,
    keys: Codes,
    v_BHMF: Tensor,
    v_scales: Tensor | None,
    *,
    scale: float,
    rotation: Tensor | None,
    out_scale: Tensor | None,
    dtype: torch.dtype,
    descriptors: bool | None = None,
    scratch: bool | None = None,
) -> Tensor:
    """Run `attend_kernel`: (B, N, H, F) in `dtype`, or codes of the keys' type if `out_scale` is given.

    Args:
        q_BHNE: floating point, to be quantized as the keys were; or codes.
        q_scale: None, one number, or of codes (B, H, N).
        keys: codes (B, H, M, E or P), the last dimension contiguous.
        v_BHMF: floating point; or e4m3 codes, a view of (B, H, F, M) memory, with `v_scales`.
        scale: factor on the logits.
        rotation: R (E, P) of the queries, or None.
        descriptors: whether keys and values come through the copy engine; None: where that is possible.
        scratch: whether codes of queries pass through the output's memory; None: where that helps.

    Raises:
        ValueError: the factor is not positive.
    """
    if not scale > 0:
        raise ValueError(f"attention kernels want a positive factor on the logits, and this is {scale}.")
    batch, heads, tokens, width = q_BHNE.shape
    (count, v_width), k_width = v_BHMF.shape[-2:], keys.codes.shape[-1]
    integer, fp8_values = keys.codes.dtype == torch.int8, v_scales is not None
    out_dtype = dtype if out_scale is None else keys.codes.dtype
    y_BNHF = torch.empty((batch, tokens, heads, v_width), dtype=out_dtype, device=q_BHNE.device)
    if not y_BNHF.numel():
        return y_BNHF
    block_e, block_f = power_of_two(k_width, 32), power_of_two(v_width, 16)
    kind = f"{'int8' if integer else 'fp8'}_attention_{64 if max(block_e, block_f) <= 64 else 128}"
    tile = choose(kind, q_BHNE.device, Shape(count, width, v_width))
    block_n = min(tile.block_n, 32) if v_BHMF.dtype == torch.float32 else tile.block_n
    whole, half, tail = steps(count, block_n, 32 if fp8_values else 16)
    v_last = v_BHMF.transpose(-2, -1) if fp8_values else v_BHMF
    if descriptors is None:
        descriptors = q_BHNE.device.type == "cuda" and describable(keys.codes) and describable(v_last)
    if scratch is None:
        scratch = q_BHNE.device.type == "cuda" and has_copy_engine(q_BHNE.device)
    made_here = q_BHNE.dtype != keys.codes.dtype
    scratch = scratch and made_here and k_width <= v_width * y_BNHF.element_size()
    v_block = [1, 1, block_f, block_n] if fp8_values else [1, 1, block_n, block_f]
    rows = (0, 0, 0) if q_scale is None or q_scale.numel() == 1 else q_scale.stride()[:3]
    options = {} if (most := registers(tile)) is None else {"maxnreg": most}
    with torch.cuda.device_of(q_BHNE):
        attend_kernel[(-(-tokens // tile.block_m) * batch * heads,)](
            q_BHNE, q_scale, keys.codes, keys.scale, v_BHMF, keys.scale if v_scales is None else v_scales,
            y_BNHF, out_scale, rotation,
            TensorDescriptor.from_tensor(keys.codes, [1, 1, block_n, block_e]) if descriptors else None,
            TensorDescriptor.from_tensor(v_last, v_block) if descriptors else None,
            scale * math.log2(math.e) / (1 if rotation is None else k_width), heads, tokens, count,
            *q_BHNE.stride(), *rows, *keys.codes.stride()[:3], *keys.scale.stride(), *v_BHMF.stride(),
            *((0, 0) if v_scales is None else v_scales.stride()[:2]),
            WIDTH_Q=width, WIDTH_K=k_width, WIDTH_V=v_width, BLOCK_E=block_e, BLOCK_F=block_f,
            BLOCK_M=tile.block_m, BLOCK_N=block_n, WHOLE=whole, HALF=half, TAIL=tail,
            Q_FORM="codes" if not made_here else "token" if q_scale is None else "given",
            LARGEST=127 if integer else 448, INTEGER=integer, ROTATED=0 if rotation is None else k_width,
            TOKEN_SCALES=keys.by_token, FP8_VALUES=fp8_values, OUT_CODES=out_scale is not None,
            TMA=descriptors, SCRATCH=scratch, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False, **options,
        )  # fmt: skip
    return y_BNHF
