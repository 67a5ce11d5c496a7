"""Prepare the chunks of Kimi delta attention for the scan, in one pass over q, k and g.

With G the running sum of g [., K] inside a chunk of 64 tokens,

    qin = scale e^G q ;  kin = e^G k ;  kout = e^(G_last - G) k ;  decay = e^(G_last)
    N = tril(sum_d k_id k_jd e^(G_id - G_jd), -1) ;  A = (diag(1 / beta) + N)^-1
    P = scale * tril(sum_d q_id k_jd e^(G_id - G_jd))

Each tile of channels takes one matrix product over the whole chunk: e^(G_i - G_j) = e^(G_i - R) e^(R - G_j), with R in
the middle of the range of G in that channel. Both factors are finite if no channel decays by more than `WIDEST` from
the first row to the last. In chunks with a wider range, kout, A and P are not finite or not written here, and
`chunk_kda_strong_decay` writes them; qin, kin and decay are correct for any gate.

Rows are processed in the order 0, 4, .. 60, 1, 5, .. 61, .., so that a thread holds four consecutive rows and computes
most of a running sum by itself. Sums over channels do not depend on this order, and the two products are put in token
order once, at the end. Triton decides which thread holds which row; this affects speed only, not the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .chunks import locate_chunk
from .math import LOG2E, dot
from .runtime import NOT_MEASURED, LaunchConfig, tl, triton
from .triangular_inverse import halves, invert_halves, store_halves

# Widest log-decay range that is split in the middle, by dtype of the inputs. At 120, factors reach e^60, so |k| may be
# up to 1e12 in fp32 and bf16. Products can overflow only above the diagonal, where they are discarded. Rounding a
# running sum costs up to 2^-24 of it: at 120 less than 1e-5, negligible next to the rounding of bf16 and fp16 operands.
# With fp32 inputs, a range of 8 keeps the error within twice that of exponents summed from row to row.
WIDEST = {torch.bfloat16: 120.0, torch.float16: 120.0, torch.float32: 8.0}
RUN = tl.constexpr(4)  # consecutive rows that a thread holds
VECTOR = tl.constexpr(4)  # channels that a thread loads at once; with more, it would hold fewer rows


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(LaunchConfig):
    """Launch parameters of the preparation.

    Args:
        BK: channels per step.
        num_stages: pipeline stages of the loads.
    """

    BK: int
    num_stages: int


# Compiles without spills on every target.
PREPARE_CONFIG = PrepareConfig(BK=32, num_warps=4, num_stages=3, measured_on=NOT_MEASURED)


@triton.jit
def row_order(BT: tl.constexpr):
    """0, 4, .. 60, 1, 5, .. 61, .. for BT = 64."""
    o_i = tl.arange(0, BT)
    return o_i % (BT // RUN) * RUN + o_i // (BT // RUN)


@triton.jit
def running_sum(b_x, BT: tl.constexpr):
    """Inclusive running sum over the rows of `b_x` ``[BT, BK]``, in `row_order`, and the total ``[BT / 4, BK]``.

    Nothing is subtracted. For sums from the end, load rows in reverse: Triton's reverse scans move all data.
    """
    b_x = tl.reshape(b_x, [RUN, BT // RUN, b_x.shape[1]])
    b_sum = tl.cumsum(tl.sum(b_x, 0), 0)
    o_r = tl.arange(0, BT // RUN)[:, None] + tl.zeros_like(b_sum).to(tl.int32)
    b_before = tl.where(o_r > 0, tl.gather(b_sum, tl.maximum(o_r - 1, 0), 0), 0.0)
    b_all = tl.gather(b_sum, tl.maximum(o_r, BT // RUN - 1), 0)
    b_x = tl.cumsum(b_x, 0) + b_before[None, :, :]
    return tl.reshape(b_x, [BT, b_x.shape[2]]), b_all


@triton.jit
def _spread(b_x, BT: tl.constexpr):
    """Expand ``[BT / 4, BK]`` to ``[BT, BK]``: repeat each row for the four rows of its thread."""
    b_x = tl.broadcast_to(b_x[None, :, :], [RUN, BT // RUN, b_x.shape[1]])
    return tl.reshape(b_x, [BT, b_x.shape[2]])


@triton.jit
def _in_order(b_x, BT: tl.constexpr):
    """Permute rows and columns of ``[BT, BT]`` from `row_order` to token order."""
    b_x = tl.permute(tl.reshape(b_x, [RUN, BT // RUN, RUN, BT // RUN]), [1, 0, 3, 2])
    return tl.reshape(b_x, [BT, BT])


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_g,  # [B, T, HV, K]
    p_beta,  # [B, T, HV]
    p_qin,  # [B, T, HV, K]  scale e^G q / |q|
    p_kin,  # [B, T, HV, K]  e^G k / |k|
    p_kout,  # [B, T, HV, K]  e^(G_last - G) k / |k|
    p_decay,  # [chunks, HV, K]  e^(G_last)
    p_range,  # [chunks, HV]  log-decay from the first row to the last in the channel where it is largest
    p_norms,  # [B, T, HV, 2]  1 / |q|, 1 / |k|; None if q and k are not normalised
    p_a,  # [B, T, HV, 64]
    p_p,  # [B, T, HV, 64]
    p_n,  # [B, T, HV, 64] fp32, or None: only a backward needs N
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
    stride_bb,
    stride_bt,
    stride_bh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    INSIDE: tl.constexpr,
    OPERANDS: tl.constexpr,
    WIDEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    # From here on, rows are counted from the chunk's first: o_s in token order, o_i in `row_order`.
    rows = tl.minimum(end - i_t, BT).to(tl.int32)
    first = (i_b * T + i_t) * HV + i_h
    o_s = tl.arange(0, BT)
    o_i = row_order(BT)
    m_i, m_s = o_i < rows, o_s < rows
    p_q += i_b * stride_qb + i_t * stride_qt + i_h // (HV // HK) * stride_qh
    p_k += i_b * stride_kb + i_t * stride_kt + i_h // (HV // HK) * stride_kh
    p_g += i_b * stride_gb + i_t * stride_gt + i_h * stride_gh
    b_rq = tl.full([BT], 1.0, tl.float32)
    b_rk = tl.full([BT], 1.0, tl.float32)
    if p_norms is not None:
        b_qq = tl.zeros([BT], tl.float32)
        b_kk = tl.zeros([BT], tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.max_contiguous(tl.arange(0, BK), VECTOR)
            m_ik = m_i[:, None] & (o_k < K)[None, :]
            b_q = tl.load(p_q + o_i[:, None] * stride_qt + o_k[None, :], mask=m_ik, other=0.0).to(tl.float32)
            b_k = tl.load(p_k + o_i[:, None] * stride_kt + o_k[None, :], mask=m_ik, other=0.0).to(tl.float32)
            b_qq += tl.sum(b_q * b_q, 1)
            b_kk += tl.sum(b_k * b_k, 1)
        b_rq = tl.rsqrt(b_qq + 1e-6)
        b_rk = tl.rsqrt(b_kk + 1e-6)
        tl.store(p_norms + (first + o_i * HV) * 2, b_rq, mask=m_i)
        tl.store(p_norms + (first + o_i * HV) * 2 + 1, b_rk, mask=m_i)
    b_rq *= scale
    dtype = p_q.dtype.element_ty

    p_qin += first * K
    p_kin += first * K
    p_kout += first * K
    p_decay += (i_chunk * HV + i_h) * K
    b_kk = tl.zeros([BT, BT], tl.float32)
    b_qk = tl.zeros([BT, BT], tl.float32)
    b_range = tl.zeros([BT // RUN, BK], tl.float32)
    # g, then k, then q: with all three in registers, tiles would have to be half as wide.
    for i_k in range(0, K, BK):
        o_k = i_k + tl.max_contiguous(tl.arange(0, BK), VECTOR)
        m_k = o_k < K
        m_ik = m_i[:, None] & m_k[None, :]
        o_out = o_i[:, None] * (HV * K) + o_k[None, :]
        # Log-decay from the first row to each row; the first row's own decay is a common factor.
        m_g = m_ik & (o_i > 0)[:, None]
        b_g = tl.load(p_g + o_i[:, None] * stride_gt + o_k[None, :], mask=m_g, other=0.0)
        b_first = tl.load(p_g + o_k, mask=m_k, other=0.0) * LOG2E
        b_g, b_last = running_sum(b_g, BT)
        b_g *= LOG2E
        b_last *= LOG2E
        b_range = tl.minimum(b_range, b_last)

        b_middle = _spread(0.5 * b_last, BT)
        b_k = tl.load(p_k + o_i[:, None] * stride_kt + o_k[None, :], mask=m_ik, other=0.0).to(tl.float32)
        b_k *= b_rk[:, None]
        b_up = b_k * tl.exp2(b_middle - b_g)
        b_kc = tl.trans(b_up.to(INSIDE))
        tl.store(p_kout + o_out, (b_up * tl.exp2(b_middle)).to(dtype), mask=m_ik)
        b_down = tl.exp2(b_g - b_middle)
        b_kk = dot((b_k * b_down).to(INSIDE), b_kc, b_kk, PRECISION=PRECISION)
        b_in = tl.exp2(b_g + b_first[None, :])
        tl.store(p_kin + o_out, (b_k * b_in).to(dtype), mask=m_ik)
        # The last row has the total, even if the sequence ends before it.
        o_decay = o_k[None, :] + tl.zeros([BT, 1], tl.int32)
        tl.store(p_decay + o_decay, b_in, mask=(o_i == BT - 1)[:, None] & m_k[None, :])
        b_q = tl.load(p_q + o_i[:, None] * stride_qt + o_k[None, :], mask=m_ik, other=0.0).to(tl.float32)
        b_q *= b_rq[:, None]
        tl.store(p_qin + o_out, (b_q * b_in).to(dtype), mask=m_ik)
        b_qk = dot((b_q * b_down).to(INSIDE), b_kc, b_qk, PRECISION=PRECISION)

    widest = tl.min(tl.min(b_range, 0), 0) / LOG2E
    tl.store(p_range + i_chunk * HV + i_h, widest)
    if widest > -WIDEST:
        o_tile = (first + o_s * HV)[:, None] * BT + o_s[None, :]
        b_p = tl.where(o_s[:, None] >= o_s[None, :], _in_order(b_qk, BT), 0.0)
        tl.store(p_p + o_tile, b_p.to(dtype), mask=m_s[:, None])
        p_beta += i_b * stride_bb + i_t * stride_bt + i_h * stride_bh
        b_beta = tl.load(p_beta + o_s * stride_bt, mask=m_s, other=0.0).to(tl.float32)
        b_m = tl.where(o_s[:, None] > o_s[None, :], -_in_order(b_kk, BT), 0.0)
        if p_n is not None:
            tl.store(p_n + o_tile, -b_m, mask=m_s[:, None])
        b_m = b_m.to(OPERANDS)
        b_m0, b_m1, b_m10 = halves(b_m)
        b_a0, b_a1, b_a10 = invert_halves(b_m0, b_m1, b_m10, b_beta, OPERANDS)
        store_halves(p_a + first * BT, HV * BT, b_a0, b_a1, b_a10, rows)
