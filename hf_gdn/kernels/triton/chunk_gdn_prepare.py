"""Compute A, P and the gates of every chunk before the scan of the gated delta rule, one decay per head.

With G the running sum of g inside a chunk of 64 tokens,

    A = (diag(1 / beta) + tril(K K^T e^(G_i - G_j), -1))^-1 ;  P = scale * tril(Q K^T) e^(G_i - G_j)
    kin = e^G ;  qin = scale e^G ;  kout = e^(G_last - G) ;  decay = e^(G_last)

A program serves a chunk and a key head. It computes K K^T and Q K^T once, in three tiles of 32 rows and columns (the
fourth is above the diagonal), and from them A and P of each value head. Applying the gate after the inverse instead of
before it would cost the same. Applied before, the gate's registers are freed early, and no value in the inverse grows
more than the state does.

With qk_l2norm, normalised q and k are not stored: 1/|q| and 1/|k| are one number per token, multiplied into qin, kin
and kout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .chunks import CHUNK, locate_chunk
from .math import LOG2E, dot
from .runtime import NOT_MEASURED, LaunchConfig, tl, triton
from .triangular_inverse import invert_halves, store_halves

HALF = CHUNK // 2


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(LaunchConfig):
    """Launch parameters of the preparation.

    Args:
        BK: channels per step.
        num_stages: pipeline stages of the loads.
    """

    BK: int
    num_stages: int


# By dtype of the inputs. Chosen so that bf16 and fp32 do not spill.
PREPARE_CONFIGS = {
    torch.bfloat16: PrepareConfig(BK=64, num_warps=2, num_stages=2, measured_on=NOT_MEASURED),
    torch.float16: PrepareConfig(BK=64, num_warps=4, num_stages=2, measured_on=NOT_MEASURED),
    torch.float32: PrepareConfig(BK=64, num_warps=8, num_stages=2, measured_on=NOT_MEASURED),
}


@triton.jit
def _load_sums(p_g, m_t):
    """Running sum of the log-decay as two fp32 numbers, the sum of the rows after each row, and the total.

    A small decay would be lost in the difference of two long fp32 sums; two fp32 numbers per sum keep it. Values are
    base-2 logarithms, for the hardware's exp2; they are converted here, while they are float64. As in eager, g is
    clamped, because -inf or -1e30 in a sum would absorb all other terms; NaN stays.
    """
    b_g = tl.load(p_g, mask=m_t, other=0.0)
    b_g = tl.where(b_g < -1e3, -1e3, b_g).to(tl.float64) * LOG2E
    b_sum = tl.cumsum(b_g, 0)
    whole = tl.sum(b_g, 0)
    b_high = b_sum.to(tl.float32)
    return b_high, (b_sum - b_high).to(tl.float32), (whole - b_sum).to(tl.float32), whole.to(tl.float32)


@triton.jit
def _gate(b_high, b_low, BC: tl.constexpr):
    """e^(G_i - G_j), ``[BC, BC]``, zero above the diagonal."""
    o_i = tl.arange(0, BC)
    b_gap = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    return tl.exp2(tl.where(o_i[:, None] >= o_i[None, :], b_gap, float("-inf")))


@triton.jit
def _inverse_norm(p_x, m_t, K: tl.constexpr, BK: tl.constexpr):
    """1 / |row|. Needed for q only, because |k|^2 is on the diagonal of K K^T."""
    o_k = tl.arange(0, BK)
    b_squares = tl.full([m_t.shape[0]], 1e-6, tl.float32)
    for i_k in range(0, K, BK):
        b_x = tl.load(p_x + i_k, mask=m_t[:, None] & (o_k < K - i_k)[None, :], other=0.0).to(tl.float32)
        b_squares += tl.sum(b_x * b_x, 1)
    return tl.rsqrt(b_squares)


@triton.jit
def _scaled(b_x, b_row, b_column, COLUMNS: tl.constexpr):
    b_x *= b_row[:, None]
    if COLUMNS:
        b_x *= b_column[None, :]
    return b_x


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_g,  # [B, T, HV]
    p_beta,  # [B, T, HV]
    p_a,  # [B, T, HV, 64]
    p_p,  # [B, T, HV, 64]
    p_kin,  # [B, T, HV]  e^G / |k|
    p_qin,  # [B, T, HV]  scale e^G / |q|
    p_kout,  # [B, T, HV]  e^(G_last - G) / |k|
    p_decay,  # [chunks, HV]  e^(G_last)
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
    BC: tl.constexpr,
    BK: tl.constexpr,
    INSIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    QK_L2NORM: tl.constexpr,
):
    # Suffix 0: rows and columns of the chunk's first half; 1: of its second half; 10: second half by first half.
    i_chunk = tl.program_id(0).to(tl.int64)
    i_hk = tl.program_id(1).to(tl.int64)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    o_i = tl.arange(0, BC)
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    tokens = tl.minimum(end - i_t, BT).to(tl.int32)
    m_0, m_1, m_t = o_i < tokens, o_i + BC < tokens, o_t < tokens
    o_wide = o_i.to(tl.int64)
    p_q += i_b * stride_qb + i_hk * stride_qh + (i_t + o_wide)[:, None] * stride_qt + o_k[None, :]
    p_k += i_b * stride_kb + i_hk * stride_kh + (i_t + o_wide)[:, None] * stride_kt + o_k[None, :]

    b_qk0 = tl.zeros([BC, BC], tl.float32)
    b_qk1 = tl.zeros([BC, BC], tl.float32)
    b_qk10 = tl.zeros([BC, BC], tl.float32)
    b_kk0 = tl.zeros([BC, BC], tl.float32)
    b_kk1 = tl.zeros([BC, BC], tl.float32)
    b_kk10 = tl.zeros([BC, BC], tl.float32)
    for i_k in range(0, K, BK):
        m_k = (o_k < K - i_k)[None, :]
        b_q0 = tl.load(p_q + i_k, mask=m_0[:, None] & m_k, other=0.0)
        b_q1 = tl.load(p_q + i_k + BC * stride_qt, mask=m_1[:, None] & m_k, other=0.0)
        b_k0 = tl.load(p_k + i_k, mask=m_0[:, None] & m_k, other=0.0)
        b_k1 = tl.load(p_k + i_k + BC * stride_kt, mask=m_1[:, None] & m_k, other=0.0)
        b_qk0 = dot(b_q0, tl.trans(b_k0), b_qk0, PRECISION=PRECISION)
        b_qk1 = dot(b_q1, tl.trans(b_k1), b_qk1, PRECISION=PRECISION)
        b_qk10 = dot(b_q1, tl.trans(b_k0), b_qk10, PRECISION=PRECISION)
        b_kk0 = dot(b_k0, tl.trans(b_k0), b_kk0, PRECISION=PRECISION)
        b_kk1 = dot(b_k1, tl.trans(b_k1), b_kk1, PRECISION=PRECISION)
        b_kk10 = dot(b_k1, tl.trans(b_k0), b_kk10, PRECISION=PRECISION)
    b_rq0 = tl.full([BC], 1.0, tl.float32) * scale
    b_rq1 = tl.full([BC], 1.0, tl.float32) * scale
    b_rk0 = tl.full([BC], 1.0, tl.float32)
    b_rk1 = tl.full([BC], 1.0, tl.float32)
    if QK_L2NORM:
        m_same = o_i[:, None] == o_i[None, :]
        b_rk0 = tl.rsqrt(tl.sum(tl.where(m_same, b_kk0, 0.0), 1) + 1e-6)
        b_rk1 = tl.rsqrt(tl.sum(tl.where(m_same, b_kk1, 0.0), 1) + 1e-6)
    b_kk0 = _scaled(b_kk0, -b_rk0, b_rk0, QK_L2NORM).to(INSIDE)
    b_kk1 = _scaled(b_kk1, -b_rk1, b_rk1, QK_L2NORM).to(INSIDE)
    b_kk10 = _scaled(b_kk10, -b_rk1, b_rk0, QK_L2NORM).to(INSIDE)
    if QK_L2NORM:
        b_rq0 *= _inverse_norm(p_q, m_0, K, BK)
        b_rq1 *= _inverse_norm(p_q + BC * stride_qt, m_1, K, BK)
    b_qk0 = _scaled(b_qk0, b_rq0, b_rk0, QK_L2NORM).to(INSIDE)
    b_qk1 = _scaled(b_qk1, b_rq1, b_rk1, QK_L2NORM).to(INSIDE)
    b_qk10 = _scaled(b_qk10, b_rq1, b_rk0, QK_L2NORM).to(INSIDE)

    p_g += i_b * stride_gb + i_t * stride_gt
    p_beta += i_b * stride_bb + i_t * stride_bt
    # One stage: prefetching is not worth its registers.
    for i_h in tl.range(i_hk * (HV // HK), (i_hk + 1) * (HV // HK), num_stages=1):
        p_gh = p_g + i_h * stride_gh + o_wide * stride_gt
        b_high0, b_low0, b_rest0, whole0 = _load_sums(p_gh, m_0)
        b_high1, b_low1, b_rest1, whole1 = _load_sums(p_gh + BC * stride_gt, m_1)
        b_beta = tl.load(p_beta + i_h * stride_bh + o_t.to(tl.int64) * stride_bt, mask=m_t, other=0.0).to(tl.float32)
        row = (i_b * T + i_t) * HV + i_h
        o_row = row + o_i * HV
        b_in0 = tl.exp2(b_high0)
        b_in1 = tl.exp2(b_high1 + whole0)
        tl.store(p_kin + o_row, b_in0 * b_rk0, mask=m_0)
        tl.store(p_kin + o_row + BC * HV, b_in1 * b_rk1, mask=m_1)
        tl.store(p_qin + o_row, b_in0 * b_rq0, mask=m_0)
        tl.store(p_qin + o_row + BC * HV, b_in1 * b_rq1, mask=m_1)
        tl.store(p_kout + o_row, tl.exp2(b_rest0 + whole1) * b_rk0, mask=m_0)
        tl.store(p_kout + o_row + BC * HV, tl.exp2(b_rest1) * b_rk1, mask=m_1)
        tl.store(p_decay + i_chunk * HV + i_h, tl.exp2(whole0 + whole1))

        # Between the halves, both exponents are sums of gates, so neither factor exceeds 1.
        b_gate0 = _gate(b_high0, b_low0, BC).to(INSIDE)
        b_gate1 = _gate(b_high1, b_low1, BC).to(INSIDE)
        b_gate10 = (tl.exp2(b_high1)[:, None] * tl.exp2(b_rest0)[None, :]).to(INSIDE)
        store_halves(p_p + row * BT, HV * BT, b_qk0 * b_gate0, b_qk1 * b_gate1, b_qk10 * b_gate10, tokens)
        b_a0, b_a1, b_a10 = invert_halves(b_kk0 * b_gate0, b_kk1 * b_gate1, b_kk10 * b_gate10, b_beta, INSIDE)
        store_halves(p_a + row * BT, HV * BT, b_a0, b_a1, b_a10, tokens)
