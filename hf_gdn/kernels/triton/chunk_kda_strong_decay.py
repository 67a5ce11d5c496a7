"""Prepare the chunks of Kimi delta attention whose decay is too strong for one product over the whole chunk.

For these chunks, this file computes what `chunk_kda_prepare` cannot (G is the running sum of g [., K] inside a chunk of
64 tokens):

    N = tril(sum_d k_id k_jd e^(G_id - G_jd), -1) ;  A = (diag(1 / beta) + N)^-1
    P = scale * tril(sum_d q_id k_jd e^(G_id - G_jd)) ;   kout = e^(G_last - G) k

The gate has no lower bound, so e^(G_i - G_j) is split at a reference between the two rows. For rows of one 16-row block
and columns before it, this is the block's first row; both factors are then at most 1 for any gate. Inside a block, it
is the middle of the block's range if both factors are finite; otherwise the block is computed column by column without
splitting. No exponent is the difference of two sums: each is summed from the gates between its two rows.

Programs of all other chunks read the chunk's range and return.
"""

from __future__ import annotations

from dataclasses import dataclass

from .chunk_kda_prepare import RUN, VECTOR, row_order, running_sum
from .chunks import locate_chunk
from .math import LOG2E, dot, only_if
from .runtime import NOT_MEASURED, LaunchConfig, tl, triton
from .triangular_inverse import invert_halves, store_halves

# Widest log-decay of a 16-row block that is computed by one product: factors reach e^60, which times k is well inside
# the range of fp32. Products can overflow only above the diagonal, where they are discarded.
_WIDEST_BLOCK = tl.constexpr(120.0)


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(LaunchConfig):
    """Launch parameters of the scores kernel: BC rows of a chunk per program, BK channels per step."""

    BC: int
    BK: int


@dataclass(frozen=True, kw_only=True)
class InverseConfig(LaunchConfig):
    """Launch parameters of the inverse kernel: BK channels per step."""

    BK: int


# Compiles without spills on every target.
SCORES_CONFIG = ScoresConfig(BC=16, BK=32, num_warps=2, measured_on=NOT_MEASURED)
INVERSE_CONFIG = InverseConfig(BK=32, num_warps=4, measured_on=NOT_MEASURED)


@triton.jit(do_not_specialize=["T"])
def scores_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_g,  # [B, T, HV, K]
    p_range,  # [chunks, HV]
    p_norms,  # [B, T, HV, 2], or None
    p_n,  # [B, T, HV, 64] fp32
    p_p,  # [B, T, HV, 64]
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    scale,
    T,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_gb,
    stride_gt,
    stride_gh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    INSIDE: tl.constexpr,
    WIDEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # A program serves BC rows of a chunk. Suffix c: columns of the whole chunk; no suffix: its rows, and their columns.
    # The chunk's columns are processed from the last, in `row_order`, and put in token order at the end.
    i_program = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_r = i_program % (BT // BC) * BC
    i_chunk = i_program // (BT // BC)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t + i_r >= end:
        return
    if tl.load(p_range + i_chunk * HV + i_h) > -WIDEST:
        return
    o_i = tl.arange(0, BC)
    o_c = BT - 1 - row_order(BT)
    o_t = i_t + i_r + o_i
    o_tc = i_t + o_c
    m_t = o_t < end
    m_early = o_c < i_r
    p_q += i_b * stride_qb + i_h // (HV // HK) * stride_qh
    p_k += i_b * stride_kb + i_h // (HV // HK) * stride_kh
    p_g += i_b * stride_gb + i_h * stride_gh
    dtype = p_q.dtype.element_ty

    b_kkc = tl.zeros([BC, BT], tl.float32)
    b_qkc = tl.zeros([BC, BT], tl.float32)
    b_kk = tl.zeros([BC, BC], tl.float32)
    b_qk = tl.zeros([BC, BC], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.max_contiguous(tl.arange(0, BK), VECTOR)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        b_q = tl.load(p_q + o_t[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        # Log-decay from the first of the rows to each of them.
        m_g = m_tk & (o_i > 0)[:, None]
        b_g = tl.cumsum(tl.load(p_g + o_t[:, None] * stride_gt + o_k[None, :], mask=m_g, other=0.0), 0)
        if i_r > 0:
            # Log-decay from each column to the first of the rows: the sum of the gates after the column.
            m_c = m_early[:, None] & m_k[None, :]
            b_gc = tl.load(p_g + (o_tc[:, None] + 1) * stride_gt + o_k[None, :], mask=m_c, other=0.0)
            b_kc = tl.load(p_k + o_tc[:, None] * stride_kt + o_k[None, :], mask=m_c, other=0.0).to(tl.float32)
            b_gc, _ = running_sum(b_gc, BT)
            b_kc = (b_kc * tl.exp2(b_gc * LOG2E)).to(dtype)
            b_down = tl.exp2(b_g * LOG2E)
            b_kkc = dot((b_k * b_down).to(dtype), tl.trans(b_kc), b_kkc, PRECISION=PRECISION)
            b_qkc = dot((b_q * b_down).to(dtype), tl.trans(b_kc), b_qkc, PRECISION=PRECISION)

        b_range = tl.min(b_g, 0)
        if tl.min(b_range, 0) > -_WIDEST_BLOCK:
            b_x = (b_g - 0.5 * b_range[None, :]) * LOG2E
            b_down = tl.exp2(b_x)
            b_kc = tl.trans((b_k * tl.exp2(-b_x)).to(INSIDE))
            b_kk = dot((b_k * b_down).to(INSIDE), b_kc, b_kk, PRECISION=PRECISION)
            b_qk = dot((b_q * b_down).to(INSIDE), b_kc, b_qk, PRECISION=PRECISION)
        else:
            # Column by column from the last; b_x is the log-decay from the column to the rows after it.
            b_x = tl.zeros([BC, BK], tl.float32)
            for i in range(BC):
                i_j = BC - 1 - i
                t_j = i_t + i_r + i_j
                m_next = only_if(m_k, (i > 0) & (t_j + 1 < end))
                b_next = tl.load(p_g + (t_j + 1) * stride_gt + o_k, mask=m_next, other=0.0)
                b_kj = tl.load(p_k + t_j * stride_kt + o_k, mask=only_if(m_k, t_j < end), other=0.0).to(tl.float32)
                b_x += tl.where((o_i > i_j)[:, None], b_next[None, :], 0.0)
                b_kj = tl.exp2(b_x * LOG2E) * b_kj[None, :]
                m_j = (o_i == i_j)[None, :]
                b_kk += tl.where(m_j, tl.sum(b_k * b_kj, 1)[:, None], 0.0)
                b_qk += tl.where(m_j, tl.sum(b_q * b_kj, 1)[:, None], 0.0)

    o_row = (i_b * T + o_t) * HV + i_h
    b_p = tl.full([BC], 1.0, tl.float32) * scale
    if p_norms is not None:
        b_p *= tl.load(p_norms + o_row * 2, mask=m_t, other=0.0)
        b_norm = tl.load(p_norms + o_row * 2 + 1, mask=m_t, other=0.0)
        o_rowc = (i_b * T + o_tc) * HV + i_h
        b_normc = tl.load(p_norms + o_rowc * 2 + 1, mask=m_early & (o_tc < end), other=0.0)
        b_kk = b_kk * b_norm[None, :] * b_norm[:, None]
        b_qk *= b_norm[None, :]
        b_kkc = b_kkc * b_normc[None, :] * b_norm[:, None]
        b_qkc *= b_normc[None, :]
    b_kk = tl.where(o_i[:, None] > o_i[None, :], b_kk, 0.0)
    b_qk = tl.where(o_i[:, None] >= o_i[None, :], b_qk, 0.0) * b_p[:, None]
    # Store the columns of the rows themselves, then the others: results before them, zeros after them.
    b_kkc = tl.reshape(tl.permute(tl.reshape(b_kkc, [BC, RUN, BT // RUN]), [0, 2, 1]), [BC, BT])
    b_qkc = tl.reshape(tl.permute(tl.reshape(b_qkc, [BC, RUN, BT // RUN]), [0, 2, 1]), [BC, BT])
    o_c = BT - 1 - tl.arange(0, BT)
    m_early = o_c < i_r
    o_own = o_row[:, None] * BT + i_r + o_i[None, :]
    tl.store(p_n + o_own, b_kk, mask=m_t[:, None])
    tl.store(p_p + o_own, b_qk.to(dtype), mask=m_t[:, None])
    o_rest = o_row[:, None] * BT + o_c[None, :]
    m_rest = m_t[:, None] & (m_early | (o_c >= i_r + BC))[None, :]
    tl.store(p_n + o_rest, b_kkc, mask=m_rest)
    tl.store(p_p + o_rest, (b_qkc * b_p[:, None]).to(dtype), mask=m_rest)


@triton.jit(do_not_specialize=["T"])
def inverse_kernel(
    p_k,  # [B, T, HK, K]
    p_g,  # [B, T, HV, K]
    p_beta,  # [B, T, HV]
    p_range,  # [chunks, HV]
    p_norms,  # [B, T, HV, 2], or None
    p_n,  # [B, T, HV, 64] fp32
    p_a,  # [B, T, HV, 64]
    p_kout,  # [B, T, HV, K]
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    T,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_bb,
    stride_bt,
    stride_bh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    OPERANDS: tl.constexpr,
    WIDEST: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    if tl.load(p_range + i_chunk * HV + i_h) > -WIDEST:
        return
    rows = end - i_t
    first = ((i_b * T + i_t) * HV + i_h) * BT
    o_i = tl.arange(0, BT)
    p_beta += i_b * stride_bb + i_h * stride_bh
    b_beta = tl.load(p_beta + (i_t + o_i) * stride_bt, mask=o_i < rows, other=0.0).to(tl.float32)
    o_i = tl.arange(0, BT // 2)
    p_n += first + o_i[:, None] * (HV * BT) + o_i[None, :]
    m_0, m_1 = (o_i < rows)[:, None], (o_i + BT // 2 < rows)[:, None]
    b_n0 = tl.load(p_n, mask=m_0, other=0.0)
    b_n1 = tl.load(p_n + BT // 2 * (HV * BT + 1), mask=m_1, other=0.0)
    b_n10 = tl.load(p_n + BT // 2 * HV * BT, mask=m_1, other=0.0)
    b_a0, b_a1, b_a10 = invert_halves(
        (-b_n0).to(OPERANDS), (-b_n1).to(OPERANDS), (-b_n10).to(OPERANDS), b_beta, OPERANDS
    )
    store_halves(p_a + first, HV * BT, b_a0, b_a1, b_a10, rows)

    p_k += i_b * stride_kb + i_h // (HV // HK) * stride_kh
    p_g += i_b * stride_gb + i_h * stride_gh
    # Load g of the next row: its sum from the end is the log-decay after a row.
    o_i = BT - 1 - row_order(BT)
    o_t = i_t + o_i
    o_row = (i_b * T + o_t) * HV + i_h
    m_t = o_t < end
    m_next = (o_i < BT - 1) & (o_t + 1 < end)
    b_rk = tl.full([BT], 1.0, tl.float32)
    if p_norms is not None:
        b_rk = tl.load(p_norms + o_row * 2 + 1, mask=m_t, other=0.0)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.max_contiguous(tl.arange(0, BK), VECTOR)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        p_next = p_g + (o_t + 1)[:, None] * stride_gt + o_k[None, :]
        b_next = tl.load(p_next, mask=m_next[:, None] & m_k[None, :], other=0.0)
        b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        b_next, _ = running_sum(b_next, BT)
        b_k *= b_rk[:, None] * tl.exp2(b_next * LOG2E)
        tl.store(p_kout + o_row[:, None] * K + o_k[None, :], b_k.to(p_kout.dtype.element_ty), mask=m_tk)
