"""The backward pass of attention over short sequences (Triton): one program has a whole head of an image.

After FlashAttention-2 (Dao, arXiv:2307.08691, algorithm 2). What is particular here:

- A program goes over blocks of keys, and for each over all queries. So keys' and values' gradients are in registers,
  and no other program adds to them; the queries' gradients are summed up over blocks of keys either in memory that
  this program alone uses, or, where there is one block of keys, not at all (`scratch`). Or another program of the same
  head makes the logits once more and has them in registers (`two`).
- Gradients go straight to where the gradient of the fused projection has them, and their sums over tokens, which are
  the bias' gradient, are made on the way. PyTorch sums these over images, in one order, so that equal inputs give equal
  sums.
- Logits and their gradients are made with keys as rows, as the products for keys and values want them.

Legend: B batch, H heads, T tokens, E head width. Suffix `_nm`: a tile of that shape (n keys, m queries, e width).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Variant = Literal["scratch", "two"]

VARIANT: Variant = "scratch"
BLOCK_M, BLOCK_N = 64, 128  # queries and keys that a program holds at once
WARPS, STAGES = 8, 2
REGISTERS: int | None = None
AHEAD, TAIL, SPLIT, TOGETHER = False, True, False, True

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
def _add(sums, E, sum_e, FIRST: tl.constexpr, BLOCK_E: tl.constexpr):
    """Sums to memory, or with those that are there."""
    e = tl.arange(0, BLOCK_E)
    if not FIRST:
        sum_e += tl.load(sums + e, mask=e < E, other=0.0)
    tl.store(sums + e, sum_e, mask=e < E)


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
def _keys_step(
    k_ne, v_ne, made_k_ne, made_v_ne, sum_q, q, grad, numbers, scratch, made, start, start_n, T, E, stride, grad_stride,
    made_stride, factor, scale, QUERIES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    PADDED: tl.constexpr, AHEAD: tl.constexpr, TOGETHER: tl.constexpr, ALL_M: tl.constexpr, ALL_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of queries, and what it adds to the gradients of a block of keys."""
    e = tl.arange(0, BLOCK_E)
    m = start + tl.arange(0, BLOCK_M)
    q_me = _rows(q, m, T, stride, E, BLOCK_E, WHOLE, ALL_M)
    grad_me = _rows(grad, m, T, grad_stride, E, BLOCK_E, WHOLE, ALL_M)
    lse_m, delta_m = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    # E is more than 0, but what is loaded under a condition the compiler does not copy ahead.
    if AHEAD:  # noqa: SIM114
        lse_m, delta_m = tl.load(numbers + m), tl.load(numbers + PADDED + m)
    elif E > 0:
        lse_m, delta_m = tl.load(numbers + m), tl.load(numbers + PADDED + m)
    s_nm = tl.dot(k_ne, tl.trans(q_me), input_precision="ieee")
    if TOGETHER:
        grad_p_nm = tl.dot(v_ne, tl.trans(grad_me), input_precision="ieee")
    p_nm = tl.exp2(s_nm * factor + lse_m[None, :])
    if not ALL_N:
        n = start_n + tl.arange(0, BLOCK_N)
        p_nm = tl.where((n < T)[:, None], p_nm, 0.0)
    made_v_ne = tl.dot(p_nm.to(grad_me.dtype), grad_me, made_v_ne, input_precision="ieee")
    if not TOGETHER:
        grad_p_nm = tl.dot(v_ne, tl.trans(grad_me), input_precision="ieee")
    grad_s_nm = (p_nm * (grad_p_nm - delta_m[None, :])).to(q_me.dtype)
    made_k_ne = tl.dot(grad_s_nm, q_me, made_k_ne, input_precision="ieee")
    if QUERIES:
        # Across: a matrix unit reads keys either way, and what was just made as it is.
        made_q_em = tl.dot(tl.trans(k_ne), grad_s_nm, input_precision="ieee")
        kept = scratch + e[:, None] * PADDED + m[None, :]
        if not FIRST:
            made_q_em += tl.load(kept)
        if LAST:
            made_q_em *= scale
            sum_q += tl.sum(made_q_em, 1)
            _put(made, m, T, made_stride, E, tl.trans(made_q_em.to(q_me.dtype)), BLOCK_E, WHOLE, ALL_M)
        else:
            tl.store(kept, made_q_em)
    return made_k_ne, made_v_ne, sum_q


@triton.jit
def _keys(
    q, k, v, grad, numbers, scratch, made, sums, start_n, T, E, stride, grad_stride, part_stride, made_stride,
    factor, scale, QUERIES: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    M_WHOLE: tl.constexpr, M_REST: tl.constexpr, M_EXACT: tl.constexpr,
    AHEAD: tl.constexpr, TOGETHER: tl.constexpr, ALL_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of keys: its gradients, and with `QUERIES` what it adds to those of queries, to which the `LAST` block
    adds what others left in `scratch`. `ALL_N`: none of these keys is beyond T."""
    PADDED: tl.constexpr = M_WHOLE * BLOCK_M + M_REST
    n = start_n + tl.arange(0, BLOCK_N)
    k_ne = _rows(k, n, T, stride, E, BLOCK_E, WHOLE, ALL_N)
    v_ne = _rows(v, n, T, stride, E, BLOCK_E, WHOLE, ALL_N)
    made_k_ne = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    made_v_ne = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    sum_q = tl.zeros((BLOCK_E,), tl.float32)
    if M_WHOLE > 0:
        for start in range(0, M_WHOLE * BLOCK_M, BLOCK_M):
            made_k_ne, made_v_ne, sum_q = _keys_step(
                k_ne, v_ne, made_k_ne, made_v_ne, sum_q, q, grad, numbers, scratch, made, start, start_n, T, E, stride,
                grad_stride, made_stride, factor, scale, QUERIES, FIRST, LAST, PADDED, AHEAD, TOGETHER, True, ALL_N,
                BLOCK_M, BLOCK_N, BLOCK_E, WHOLE,
            )  # fmt: skip
    for power in tl.static_range(5):  # 256 to 16
        if M_REST & (256 >> power):
            made_k_ne, made_v_ne, sum_q = _keys_step(
                k_ne, v_ne, made_k_ne, made_v_ne, sum_q, q, grad, numbers, scratch, made,
                M_WHOLE * BLOCK_M + M_REST - M_REST % (512 >> power), start_n, T, E, stride,
                grad_stride, made_stride, factor, scale, QUERIES, FIRST, LAST, PADDED, AHEAD, TOGETHER,
                M_EXACT or M_REST % (256 >> power) > 0, ALL_N,
                256 >> power, BLOCK_N, BLOCK_E, WHOLE,
            )  # fmt: skip
    made_k_ne *= scale
    _put(made + part_stride, n, T, made_stride, E, made_k_ne, BLOCK_E, WHOLE, ALL_N)
    _put(made + 2 * part_stride, n, T, made_stride, E, made_v_ne, BLOCK_E, WHOLE, ALL_N)
    # To memory with each block: between blocks they would take many registers of each thread.
    _add(sums + part_stride, E, tl.sum(made_k_ne, 0), FIRST, BLOCK_E)
    _add(sums + 2 * part_stride, E, tl.sum(made_v_ne, 0), FIRST, BLOCK_E)
    if QUERIES and LAST:
        _add(sums, E, sum_q, True, BLOCK_E)
    if not LAST:
        tl.debug_barrier()  # other threads of this program may read what these kept


@triton.jit
def _queries_step(
    q_me, grad_me, lse_m, delta_m, made_q_me, k, v, start_n, T, E, stride, factor,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr, ALL_N: tl.constexpr,
):  # fmt: skip
    """A block of keys, and what it adds to the gradients of a block of queries."""
    n = start_n + tl.arange(0, BLOCK_N)
    k_ne = _rows(k, n, T, stride, E, BLOCK_E, WHOLE, ALL_N)
    v_ne = _rows(v, n, T, stride, E, BLOCK_E, WHOLE, ALL_N)
    s_mn = tl.dot(q_me, tl.trans(k_ne), input_precision="ieee")
    grad_p_mn = tl.dot(grad_me, tl.trans(v_ne), input_precision="ieee")
    p_mn = tl.exp2(s_mn * factor + lse_m[:, None])
    if not ALL_N:
        p_mn = tl.where((n < T)[None, :], p_mn, 0.0)
    grad_s_mn = (p_mn * (grad_p_mn - delta_m[:, None])).to(k_ne.dtype)
    return tl.dot(grad_s_mn, k_ne, made_q_me, input_precision="ieee")


@triton.jit
def _queries(
    q, k, v, grad, out, lse, made, start, T, E, stride, grad_stride, out_stride, made_stride, factor, scale,
    N_WHOLE: tl.constexpr, N_REST: tl.constexpr, N_EXACT: tl.constexpr, ALL_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries; returns their sums (BLOCK_E,). `ALL_M`: none of them is beyond T."""
    m = start + tl.arange(0, BLOCK_M)
    q_me = _rows(q, m, T, stride, E, BLOCK_E, WHOLE, ALL_M)
    grad_me = _rows(grad, m, T, grad_stride, E, BLOCK_E, WHOLE, ALL_M)
    out_me = _rows(out, m, T, out_stride, E, BLOCK_E, WHOLE, ALL_M)
    delta_m = tl.sum(grad_me.to(tl.float32) * out_me.to(tl.float32), 1)
    lse_m = tl.load(lse + m, mask=m < T, other=float("inf")) * -LOG2E
    made_q_me = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    if N_WHOLE > 0:
        for start_n in range(0, N_WHOLE * BLOCK_N, BLOCK_N):
            made_q_me = _queries_step(
                q_me, grad_me, lse_m, delta_m, made_q_me, k, v, start_n, T, E, stride, factor,
                BLOCK_N, BLOCK_E, WHOLE, True,
            )  # fmt: skip
    for power in tl.static_range(5):  # 256 to 16
        if N_REST & (256 >> power):
            made_q_me = _queries_step(
                q_me, grad_me, lse_m, delta_m, made_q_me, k, v,
                N_WHOLE * BLOCK_N + N_REST - N_REST % (512 >> power), T, E, stride, factor,
                256 >> power, BLOCK_E, WHOLE, N_EXACT or N_REST % (256 >> power) > 0,
            )  # fmt: skip
    made_q_me *= scale
    _put(made, m, T, made_stride, E, made_q_me, BLOCK_E, WHOLE, ALL_M)
    return tl.sum(made_q_me, 0)


@triton.jit
def _kernel(
    q, k, v, grad, out, lse, numbers, scratch, made, sums, T, H, E, scale,
    s_b, s_h, s_t, g_b, g_h, g_t, o_b, o_h, o_t,
    M_WHOLE: tl.constexpr, M_REST: tl.constexpr, M_EXACT: tl.constexpr,
    N_WHOLE: tl.constexpr, N_REST: tl.constexpr, N_EXACT: tl.constexpr,
    KEY_PROGRAMS: tl.constexpr, QUERY_PROGRAMS: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
    AHEAD: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A head of an image; or its keys and values in some programs, and its queries in others.

    Args:
        numbers: (B, H, 2, PADDED) float32, to be filled; PADDED is M_WHOLE * BLOCK_M + M_REST.
        scratch: (B, H, BLOCK_E, PADDED) float32, where there are several blocks of keys.
        made: (B, T, 3, H, E).
        sums: (B, PARTS, 3, H, E) float32, over tokens.
        M_WHOLE: how many whole blocks the queries are.
        M_REST: what is left of them, as a sum of powers of two, each of which is a block.
        M_EXACT: whether the last of these is whole, too.
        N_WHOLE: of keys, likewise, as N_REST and N_EXACT.
        KEY_PROGRAMS: of each head.
        QUERY_PROGRAMS: of each head; without, keys' programs make the gradients of queries.
        SPLIT: whether a program has one whole block, and the last what is left; else a program has all.
        AHEAD: whether `numbers` are copied ahead, as blocks of queries are.
        TOGETHER: whether logits and the gradients of weights are made one after the other.
        ROWS: of queries whose `numbers` are made at once.
        WHOLE: whether E is BLOCK_E.
    """
    pair = tl.program_id(0) // (KEY_PROGRAMS + QUERY_PROGRAMS)
    index = tl.program_id(0) % (KEY_PROGRAMS + QUERY_PROGRAMS)
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    head = pair.to(tl.int64)
    PADDED: tl.constexpr = M_WHOLE * BLOCK_M + M_REST
    QUERIES: tl.constexpr = QUERY_PROGRAMS == 0
    q += b * s_b + h * s_h
    k += b * s_b + h * s_h
    v += b * s_b + h * s_h
    grad += b * g_b + h * g_h
    out += b * o_b + h * o_h
    lse += head * T
    numbers += head * (2 * PADDED)
    scratch += head * (PADDED * BLOCK_E)
    part = H * E
    made += b * T * (3 * part) + h * E
    sums += b * PARTS * (3 * part) + h * E
    factor = scale * LOG2E
    if QUERY_PROGRAMS > 0 and index >= KEY_PROGRAMS:
        i = index - KEY_PROGRAMS
        sum_q = tl.zeros((BLOCK_E,), tl.float32)
        if M_WHOLE > 0:
            first, last = 0, M_WHOLE
            if SPLIT:
                first, last = i, tl.minimum(i + 1, M_WHOLE)
            for block in range(first, last):
                sum_q += _queries(
                    q, k, v, grad, out, lse, made, block * BLOCK_M, T, E, s_t, g_t, o_t, 3 * part, factor, scale,
                    N_WHOLE, N_REST, N_EXACT, True, BLOCK_M, BLOCK_N, BLOCK_E, WHOLE,
                )  # fmt: skip
        if M_REST > 0:  # noqa: SIM102, one is of constants
            if i == QUERY_PROGRAMS - 1:
                for power in tl.static_range(5):  # 256 to 16
                    if M_REST & (256 >> power):
                        sum_q += _queries(
                            q, k, v, grad, out, lse, made,
                            M_WHOLE * BLOCK_M + M_REST - M_REST % (512 >> power),
                            T, E, s_t, g_t, o_t, 3 * part, factor, scale, N_WHOLE, N_REST, N_EXACT,
                            M_EXACT or M_REST % (256 >> power) > 0,
                            256 >> power, BLOCK_N, BLOCK_E, WHOLE,
                        )  # fmt: skip
        _add(sums + i * (3 * part), E, sum_q, True, BLOCK_E)
    else:
        # Several programs of a head write the same here, and each reads what it wrote.
        _per_query(grad, out, lse, numbers, T, E, g_t, o_t, PADDED, ROWS, BLOCK_E, WHOLE)
        if SPLIT:
            sums += index * (3 * part)
            if N_WHOLE > 0:  # noqa: SIM102, one is of constants
                if index < N_WHOLE:
                    _keys(
                        q, k, v, grad, numbers, scratch, made, sums, index * BLOCK_N, T, E, s_t, g_t, part, 3 * part,
                        factor, scale, QUERIES, True, N_REST == 0 or KEY_PROGRAMS > N_WHOLE, M_WHOLE, M_REST, M_EXACT,
                        AHEAD, TOGETHER, True, BLOCK_M, BLOCK_N, BLOCK_E, WHOLE,
                    )  # fmt: skip
        else:
            if N_WHOLE > 0:
                _keys(
                    q, k, v, grad, numbers, scratch, made, sums, 0, T, E, s_t, g_t, part, 3 * part,
                    factor, scale, QUERIES, True, N_WHOLE == 1 and N_REST == 0, M_WHOLE, M_REST, M_EXACT,
                    AHEAD, TOGETHER, True, BLOCK_M, BLOCK_N, BLOCK_E, WHOLE,
                )  # fmt: skip
            MIDDLE: tl.constexpr = N_WHOLE if N_REST > 0 else N_WHOLE - 1
            if MIDDLE > 1:
                for block in range(1, MIDDLE):
                    _keys(
                        q, k, v, grad, numbers, scratch, made, sums, block * BLOCK_N, T, E, s_t, g_t, part, 3 * part,
                        factor, scale, QUERIES, False, False, M_WHOLE, M_REST, M_EXACT,
                        AHEAD, TOGETHER, True, BLOCK_M, BLOCK_N, BLOCK_E, WHOLE,
                    )  # fmt: skip
            if N_WHOLE > 1 and N_REST == 0:
                _keys(
                    q, k, v, grad, numbers, scratch, made, sums, (N_WHOLE - 1) * BLOCK_N, T, E, s_t, g_t, part,
                    3 * part, factor, scale, QUERIES, False, True, M_WHOLE, M_REST, M_EXACT,
                    AHEAD, TOGETHER, True, BLOCK_M, BLOCK_N, BLOCK_E, WHOLE,
                )  # fmt: skip
        if N_REST > 0:  # noqa: SIM102, one is of constants
            if index == KEY_PROGRAMS - 1:
                for power in tl.static_range(5):  # 256 to 16
                    if N_REST & (256 >> power):
                        _keys(
                            q, k, v, grad, numbers, scratch, made, sums,
                            N_WHOLE * BLOCK_N + N_REST - N_REST % (512 >> power),
                            T, E, s_t, g_t, part, 3 * part, factor, scale, QUERIES,
                            # The first of this program
                            (512 >> power) > N_REST and (N_WHOLE == 0 or (SPLIT and KEY_PROGRAMS > N_WHOLE)),
                            N_REST % (256 >> power) == 0,
                            M_WHOLE, M_REST, M_EXACT, AHEAD, TOGETHER,
                            N_EXACT or N_REST % (256 >> power) > 0,
                            BLOCK_M, 256 >> power, BLOCK_E, WHOLE,
                        )  # fmt: skip


def _blocks(tokens: int, block: int, tail: bool) -> tuple[int, int, bool]:
    """How many whole blocks; the width of what is left, of which each power of two is a block, in falling order, and
    at most two; and whether that is there to the last row."""
    whole, left = divmod(tokens, block)
    if not left:
        return whole, 0, True
    rest = -(-left // 16) * 16 if tail else block
    while rest.bit_count() > 2:
        rest += rest & -rest
    return whole, rest, rest == left


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
    variant: Variant = VARIANT,
    block_m: int = BLOCK_M,
    block_n: int = BLOCK_N,
    num_warps: int = WARPS,
    num_stages: int = STAGES,
    registers: int | None = REGISTERS,
    ahead: bool = AHEAD,
    tail: bool = TAIL,
    split: bool = SPLIT,
    together: bool = TOGETHER,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_gradient`, of one token at least.

    Args:
        variant: ``scratch``: queries' gradients are summed up in memory where there are several blocks of keys;
            ``two``: a second program of each head makes them.
        block_m: queries that a program holds at once.
        block_n: keys, likewise.
        num_warps: of a program.
        num_stages: loads under way.
        registers: that a thread may have, or as many as the compiler likes.
        ahead: whether what a query has besides its vectors is copied ahead as these are.
        tail: whether what whole blocks leave of queries and keys are narrow blocks.
        split: of ``two``: whether each whole block has a program of its own.
        together: whether keys' programs make logits and the gradients of weights one after the other, or these after
            what weights give to values: fewer registers in some, and more in others.
    """
    batch, heads, tokens, width = q_BHTE.shape
    q, k, v = _readable(q_BHTE, k_BHTE, v_BHTE)
    (grad,), (out,) = _readable(grad_BHTE), _readable(out_BHTE)
    lse = lse_BHT.contiguous()
    floats: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    block_e = max(16, triton.next_power_of_2(width))
    m_whole, m_rest, m_exact = _blocks(tokens, block_m, tail)
    n_whole, n_rest, n_exact = _blocks(tokens, block_n, tail)
    padded = m_whole * block_m + m_rest
    programs = [1, int(variant == "two")]
    split = split and variant == "two"
    if split:
        # What is left has a program where that is much, else the last has it, too.
        programs = [max(1, n_whole + (2 * n_rest > block_n)), max(1, m_whole + (2 * m_rest > block_m))]
    parts = max(programs)
    summed = variant == "scratch" and n_whole + n_rest.bit_count() > 1
    numbers = torch.empty((batch, heads, 2, padded), **floats)
    scratch = torch.empty((batch, heads, block_e, padded), **floats) if summed else numbers
    made = torch.empty((batch * tokens, 3 * heads * width), dtype=q.dtype, device=q.device)
    new = torch.empty if not split or programs[0] == programs[1] else torch.zeros
    sums = new((batch * parts, 3 * heads * width), **floats)
    with torch.cuda.device_of(q):
        _kernel[(batch * heads * sum(programs),)](
            q, k, v, grad, out, lse, numbers, scratch, made, sums, tokens, heads, width, scale,
            *q.stride()[:3], *grad.stride()[:3], *out.stride()[:3],
            M_WHOLE=m_whole, M_REST=m_rest, M_EXACT=m_exact, N_WHOLE=n_whole, N_REST=n_rest, N_EXACT=n_exact,
            KEY_PROGRAMS=programs[0], QUERY_PROGRAMS=programs[1], SPLIT=split, PARTS=parts,
            AHEAD=ahead, TOGETHER=together, ROWS=32 * num_warps if padded > 64 else 64,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_E=block_e, WHOLE=width == block_e,
            num_warps=num_warps, num_stages=num_stages, maxnreg=registers,
        )  # fmt: skip
    return made, sums.sum(0)
