"""The backward pass of attention over short sequences (Triton): one program has a whole head of an image.

After FlashAttention-2 (Dao, arXiv:2307.08691, algorithm 2). What is particular here:

- All keys and values of a head are one block, which stays in registers and shared memory with its gradients while
  blocks of queries pass. So every gradient is whole where it is made: nothing is added up in memory.
- Gradients go straight to where the gradient of the fused projection has them, and their sums over tokens, which are
  the bias' gradient, are made on the way. PyTorch sums these over images, in one order, so that equal inputs give equal
  sums.
- Logits and their gradients are made with keys as rows, as the products for keys and values want them.

Legend: B batch, H heads, T tokens, E head width. Suffix `_nm`: a tile of that shape (n keys, m queries, e width).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M = 32  # queries that a program holds at once
WARPS, STAGES = 8, 3
NARROW = 16  # of the last queries, where they are no more

LOG2E = tl.constexpr(1.4426950408889634)
FARTHEST = 2**31 - 1  # elements between two of a head: places within it are 32 bits


@triton.jit
def _rows(x, row, T, stride, E, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr, ALL: tl.constexpr):
    """Rows of a head (rows, BLOCK_E), `ALL` of which are there, or zeros beyond T; zeros beyond E."""
    e = tl.arange(0, BLOCK_E)
    place = x + row[:, None] * stride + e[None, :]
    if ALL and WHOLE:
        y = tl.load(place)
    elif ALL:
        y = tl.load(place, mask=(e < E)[None, :], other=0.0)
    elif WHOLE:
        y = tl.load(place, mask=(row < T)[:, None], other=0.0)
    else:
        y = tl.load(place, mask=(row < T)[:, None] & (e < E)[None, :], other=0.0)
    return y


@triton.jit
def _put(x, row, T, stride, E, y, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr, ALL: tl.constexpr):
    """`_rows` the other way: what lies beyond T and E is left out."""
    e = tl.arange(0, BLOCK_E)
    place = x + row[:, None] * stride + e[None, :]
    y = y.to(x.dtype.element_ty)
    if ALL and WHOLE:
        tl.store(place, y)
    elif ALL:
        tl.store(place, y, mask=(e < E)[None, :])
    elif WHOLE:
        tl.store(place, y, mask=(row < T)[:, None])
    else:
        tl.store(place, y, mask=(row < T)[:, None] & (e < E)[None, :])


@triton.jit
def _per_query(
    grad, out, lse, numbers, T, E, grad_stride, out_stride,
    PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Two numbers of each query, to memory: the binary logarithm of its sum of exponentials, negative, and delta, the
    product of its output and that one's gradient. Of queries that there are not: such that weights are 0."""
    for start in range(0, PADDED, ROWS):
        m = start + tl.arange(0, ROWS)
        grad_me = _rows(grad, m, T, grad_stride, E, BLOCK_E, WHOLE, False).to(tl.float32)
        out_me = _rows(out, m, T, out_stride, E, BLOCK_E, WHOLE, False).to(tl.float32)
        lse_m = tl.load(lse + m, mask=m < T, other=float("inf")) * -LOG2E
        tl.store(numbers + m, lse_m, mask=m < PADDED)
        tl.store(numbers + PADDED + m, tl.sum(grad_me * out_me, 1), mask=m < PADDED)
    tl.debug_barrier()  # other threads of this program read them


@triton.jit
def _queries(
    k_ne, v_ne, made_k_ne, made_v_ne, sum_q, q, grad, out, lse, numbers, made, start, T, E, stride, grad_stride,
    out_stride, made_stride, factor, scale, PADDED: tl.constexpr, FIRST: tl.constexpr, ALL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of queries: their gradients, and what they add to those of keys and values."""
    m = start + tl.arange(0, BLOCK_M)
    q_me = _rows(q, m, T, stride, E, BLOCK_E, WHOLE, ALL)
    grad_me = _rows(grad, m, T, grad_stride, E, BLOCK_E, WHOLE, ALL)
    if FIRST:
        lse_m, delta_m = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        if E > 0:  # it is, but what is loaded under a condition the compiler does not copy ahead
            lse_m, delta_m = tl.load(numbers + m), tl.load(numbers + PADDED + m)
    else:
        out_me = _rows(out, m, T, out_stride, E, BLOCK_E, WHOLE, ALL)
        delta_m = tl.sum(grad_me.to(tl.float32) * out_me.to(tl.float32), 1)
        lse_m = tl.load(lse + m, mask=m < T, other=float("inf")) * -LOG2E
    n = tl.arange(0, BLOCK_N)
    s_nm = tl.dot(k_ne, tl.trans(q_me), input_precision="ieee")
    grad_p_nm = tl.dot(v_ne, tl.trans(grad_me), input_precision="ieee")
    p_nm = tl.where((n < T)[:, None], tl.exp2(s_nm * factor + lse_m[None, :]), 0.0)
    made_v_ne = tl.dot(p_nm.to(grad_me.dtype), grad_me, made_v_ne, input_precision="ieee")
    grad_s_nm = (p_nm * (grad_p_nm - delta_m[None, :])).to(q_me.dtype)
    made_k_ne = tl.dot(grad_s_nm, q_me, made_k_ne, input_precision="ieee")
    # Across: a matrix unit reads keys either way, and what was just made as it is.
    made_q_em = tl.dot(tl.trans(k_ne), grad_s_nm, input_precision="ieee") * scale
    sum_q += tl.sum(made_q_em, 1)
    _put(made, m, T, made_stride, E, tl.trans(made_q_em.to(q_me.dtype)), BLOCK_E, WHOLE, ALL)
    return made_k_ne, made_v_ne, sum_q


@triton.jit
def _kernel(
    q, k, v, grad, out, lse, numbers, made, sums, T, H, E, scale,
    s_b, s_h, s_t, g_b, g_h, g_t, o_b, o_h, o_t,
    M_WHOLE: tl.constexpr, M_REST: tl.constexpr, EXACT: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A head of an image.

    Args:
        numbers: (B, H, 2, PADDED) float32, to be filled; PADDED is M_WHOLE * BLOCK_M + M_REST.
        made: (B, T, 3, H, E).
        sums: (B, 3, H, E) float32, over tokens.
        M_WHOLE: how many whole blocks the queries are.
        M_REST: width of one more block, which has what is left.
        EXACT: whether that one is whole, too.
        FIRST: whether the numbers of all queries are made first, or with each block.
        ROWS: of queries whose `numbers` are made at once.
        BLOCK_N: at least T.
        WHOLE: whether E is BLOCK_E.
    """
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    PADDED: tl.constexpr = M_WHOLE * BLOCK_M + M_REST
    q += b * s_b + h * s_h
    k += b * s_b + h * s_h
    v += b * s_b + h * s_h
    grad += b * g_b + h * g_h
    out += b * o_b + h * o_h
    lse += head * T
    numbers += head * (2 * PADDED)
    part = H * E
    made += b * T * (3 * part) + h * E
    sums += b * (3 * part) + h * E
    factor = scale * LOG2E
    if FIRST:
        _per_query(grad, out, lse, numbers, T, E, g_t, o_t, PADDED, ROWS, BLOCK_E, WHOLE)
    n, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    k_ne = _rows(k, n, T, s_t, E, BLOCK_E, WHOLE, False)
    v_ne = _rows(v, n, T, s_t, E, BLOCK_E, WHOLE, False)
    made_k_ne = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    made_v_ne = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    sum_q = tl.zeros((BLOCK_E,), tl.float32)
    if M_WHOLE > 0:
        for start in range(0, M_WHOLE * BLOCK_M, BLOCK_M):
            made_k_ne, made_v_ne, sum_q = _queries(
                k_ne, v_ne, made_k_ne, made_v_ne, sum_q, q, grad, out, lse, numbers, made, start, T, E, s_t, g_t, o_t,
                3 * part, factor, scale, PADDED, FIRST, True, BLOCK_M, BLOCK_N, BLOCK_E, WHOLE,
            )  # fmt: skip
    if M_REST > 0:
        made_k_ne, made_v_ne, sum_q = _queries(
            k_ne, v_ne, made_k_ne, made_v_ne, sum_q, q, grad, out, lse, numbers, made, M_WHOLE * BLOCK_M, T, E, s_t,
            g_t, o_t, 3 * part, factor, scale, PADDED, FIRST, EXACT, M_REST, BLOCK_N, BLOCK_E, WHOLE,
        )  # fmt: skip
    made_k_ne *= scale
    _put(made + part, n, T, 3 * part, E, made_k_ne, BLOCK_E, WHOLE, False)
    _put(made + 2 * part, n, T, 3 * part, E, made_v_ne, BLOCK_E, WHOLE, False)
    tl.store(sums + e, sum_q, mask=e < E)
    tl.store(sums + part + e, tl.sum(made_k_ne, 0), mask=e < E)
    tl.store(sums + 2 * part + e, tl.sum(made_v_ne, 0), mask=e < E)


def _readable(*given: Tensor) -> tuple[Tensor, ...]:
    """Tensors (B, H, T, E) with the same strides, as the kernel reads them."""
    first = given[0].stride()
    alike = all(x.stride() == first for x in given)
    if alike and first[3] == 1 and first[2] * given[0].shape[2] <= FARTHEST:
        return given
    return tuple(x.contiguous() for x in given)


def attention_gradient(
    grad_BHTE: Tensor,
    q_BHTE: Tensor,
    k_BHTE: Tensor,
    v_BHTE: Tensor,
    out_BHTE: Tensor,
    lse_BHT: Tensor,
    scale: float,
    *,
    block_m: int = BLOCK_M,
    num_warps: int = WARPS,
    num_stages: int = STAGES,
    first: bool = True,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_gradient`, of one token at least, for as many as registers hold: no more than `op.LONGEST`.

    Args:
        block_m: queries that a program holds at once.
        num_warps: of a program.
        num_stages: loads under way.
        first: whether what a query has besides its vectors is made for all queries first, or with each block, which is
            slower on an H200 and here to be timed on other chips.
    """
    batch, heads, tokens, width = q_BHTE.shape
    q, k, v = _readable(q_BHTE, k_BHTE, v_BHTE)
    (grad,), (out,) = _readable(grad_BHTE), _readable(out_BHTE)
    lse = lse_BHT.contiguous()
    whole, left = divmod(tokens, block_m)
    rest = 0 if left == 0 else NARROW if left <= NARROW else block_m
    padded = whole * block_m + rest
    block_n = max(16, triton.next_power_of_2(tokens))
    block_e = max(16, triton.next_power_of_2(width))
    numbers = torch.empty((batch, heads, 2, padded) if first else (1,), dtype=torch.float32, device=q.device)
    made = torch.empty((batch * tokens, 3 * heads * width), dtype=q.dtype, device=q.device)
    sums = torch.empty((batch, 3 * heads * width), dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        _kernel[(batch * heads,)](
            q, k, v, grad, out, lse, numbers, made, sums, tokens, heads, width, scale,
            *q.stride()[:3], *grad.stride()[:3], *out.stride()[:3],
            M_WHOLE=whole, M_REST=rest, EXACT=left == rest, FIRST=first, ROWS=min(block_n, 32 * num_warps),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_E=block_e, WHOLE=width == block_e,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    return made, sums.sum(0)
