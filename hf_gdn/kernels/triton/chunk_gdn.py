"""The gated delta rule in chunks of 64 tokens, one decay per head (GDN): prefill.

Per sequence and value head, G the running sum of g inside a chunk, S the state [K, V] before it:

    A = (diag(1 / beta) + tril(K K^T e^(G_i - G_j), -1))^-1
    P = scale * tril(Q K^T) e^(G_i - G_j)
    u = A (V - e^G K S) ;  O = scale e^G Q S + P u ;  S <- e^(G_last) S + K^T (e^(G_last - G) u)

The oracle is `hf_gdn.kernels.reference.delta_rule`; docs/delta_rule.md derives the form. One kernel prepares A and P
of all chunks at once, a second walks the chunks of a sequence, or of a segment of one (`segmented_scan`), with S in
registers.

A program of the first serves a chunk and a key head: K K^T and Q K^T once, in three tiles of 32 rows and columns (the
fourth lies above the diagonal), and from them A and P of each value head. A could also be inverted without the gate
and be multiplied by it afterwards, which costs the same; with the gate inside the gate is made and dropped early, and
nothing that the inverse handles grows beyond what the state does.

With qk_l2norm q and k are never written: 1/|q| and 1/|k| are numbers per token, and join those of the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import Kernel, register
from .chunks import (
    CHUNK,
    LOG2E,
    chunks_of,
    dot,
    input_precision,
    locate_chunk,
    padded,
)
from .runtime import on_device, strides, tl, triton, why_not
from .segmented_scan import load_state, locate_segment, scan, store_state
from .triangular_inverse import OPERANDS, invert_halves, store_halves

HALF = CHUNK // 2
# Channels per step, stages and warps of the preparation: so that bf16 and fp32 do not spill. Not yet timed.
PREPARE_TILE, PREPARE_STAGES = 64, 2
PREPARE_WARPS = {torch.bfloat16: 2, torch.float16: 4, torch.float32: 8}


@triton.jit
def _load_sums(p_g, m_t):
    """Running sum of the log-decay, as two fp32 numbers, what is left of it after each row, and the whole.

    In the difference of two long fp32 sums a small decay would drown; as two numbers each sum keeps it. All are
    logarithms to the base 2, which the processor's exponential takes: the factor is exact here, and nowhere else.
    """
    b_g = tl.load(p_g, mask=m_t, other=0.0).to(tl.float64) * LOG2E
    b_sum = tl.cumsum(b_g, 0)
    whole = tl.sum(b_g, 0)
    b_high = b_sum.to(tl.float32)
    return b_high, (b_sum - b_high).to(tl.float32), (whole - b_sum).to(tl.float32), whole.to(tl.float32)


@triton.jit
def _gate(b_high, b_low, BC: tl.constexpr):
    """e^(G_i - G_j), [BC, BC], and zero above the diagonal."""
    o_i = tl.arange(0, BC)
    b_gap = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    return tl.exp2(tl.where(o_i[:, None] >= o_i[None, :], b_gap, float("-inf")))


@triton.jit
def _inverse_norm(p_x, m_t, K: tl.constexpr, BK: tl.constexpr):
    """1 / |row|. Of q alone: what |k| is stands on the diagonal of K K^T."""
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


@triton.jit
def _prepare_kernel(
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
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_gb, stride_gt, stride_gh,
    stride_bb, stride_bt, stride_bh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    INSIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    QK_L2NORM: tl.constexpr,
):  # fmt: skip
    # Suffix 0: rows and columns of the chunk's first half; 1: of the second; 10: second half by first.
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
    # One stage: there is nothing to load ahead that would be worth its registers.
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

        # Between the halves both exponents are sums of gates, and neither factor exceeds 1.
        b_gate0 = _gate(b_high0, b_low0, BC).to(INSIDE)
        b_gate1 = _gate(b_high1, b_low1, BC).to(INSIDE)
        b_gate10 = (tl.exp2(b_high1)[:, None] * tl.exp2(b_rest0)[None, :]).to(INSIDE)
        store_halves(p_p + row * BT, HV * BT, b_qk0 * b_gate0, b_qk1 * b_gate1, b_qk10 * b_gate10, tokens)
        b_a0, b_a1, b_a10 = invert_halves(b_kk0 * b_gate0, b_kk1 * b_gate1, b_kk10 * b_gate10, b_beta, INSIDE)
        store_halves(p_a + row * BT, HV * BT, b_a0, b_a1, b_a10, tokens)


@triton.jit(do_not_specialize=["sequences"])
def _scan_kernel(
    p_q,  # [B, T, HK, K], or None
    p_k,  # [B, T, HK, K]
    p_v,  # [B, T, HV, V]
    p_a,  # [B, T, HV, 64]
    p_p,  # [B, T, HV, 64], or None
    p_kin,  # [B, T, HV]
    p_qin,  # [B, T, HV], or None
    p_kout,  # [B, T, HV]
    p_decay,  # [chunks, HV]
    p_initial,  # [N, HV, K, V] contiguous, or None for zeros
    p_states,  # [slots, HV, K, V + K], or None when nothing is cut
    p_final,  # [N, HV, K, V] contiguous, or None
    p_o,  # [B, T, HV, V] contiguous, or None for the states of segments alone
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_long,  # [sequences that may be long], or None
    sequences,
    minimum,
    T,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    STATE_ONLY: tl.constexpr = p_o is None
    COLUMNS: tl.constexpr = V + K if STATE_ONLY else V
    # One grid axis for everything: y and z end at 65,535. Tiles of a head are neighbours and share what they read.
    i_program = tl.program_id(0)
    i_v = i_program % tl.cdiv(COLUMNS, BV)
    i_xh = (i_program // tl.cdiv(COLUMNS, BV)).to(tl.int64)
    i_x, i_h = i_xh // HV, i_xh % HV
    i_hk = i_h // (HV // HK)
    i_n, i_s, i_slot, i_b, i_t, end, i_chunk, is_last, is_served = locate_segment(
        i_x, i_v * BV >= V, p_bounds, p_first, p_long, sequences, minimum, T, BT, SEGMENTS, STATE_ONLY
    )
    if not is_served:
        return
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    dtype = p_v.dtype.element_ty
    b_s = load_state(p_initial, p_states, i_n, i_s, i_slot, i_h, o_k, o_v, HV, K, V, SEGMENTS, STATE_ONLY)

    p_k += i_b * stride_kb + i_hk * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    if not STATE_ONLY:
        p_q += i_b * stride_qb + i_hk * stride_qh
    for i_c in range(tl.cdiv(end - i_t, BT)):
        o_t = i_t + i_c * BT + o_i
        m_t = o_t < end
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        o_row = (i_b * T + o_t) * HV + i_h
        o_tile = o_row[:, None] * BT + o_i[None, :]
        b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)
        if not STATE_ONLY:
            b_q = tl.load(p_q + o_t[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)
            b_p = tl.load(p_p + o_tile, mask=m_t[:, None], other=0.0)
            b_qin = tl.load(p_qin + o_row, mask=m_t, other=0.0)
        b_v = tl.load(p_v + o_t[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0)
        b_a = tl.load(p_a + o_tile, mask=m_t[:, None], other=0.0)
        b_kin = tl.load(p_kin + o_row, mask=m_t, other=0.0)
        b_kout = tl.load(p_kout + o_row, mask=m_t, other=0.0)
        decay = tl.load(p_decay + (i_chunk + i_c) * HV + i_h)

        b_state = b_s.to(dtype)
        b_u = b_v.to(tl.float32) - dot(b_k, b_state, PRECISION=PRECISION) * b_kin[:, None]
        b_u = dot(b_a, b_u.to(dtype), PRECISION=PRECISION)
        if not STATE_ONLY:
            b_o = dot(b_q, b_state, PRECISION=PRECISION) * b_qin[:, None]
            b_o = dot(b_p, b_u.to(dtype), b_o, PRECISION=PRECISION)
            tl.store(p_o + o_row[:, None] * V + o_v[None, :], b_o.to(dtype), mask=m_tv)
        # u is scaled and not k, which then stays as it was loaded.
        b_u *= b_kout[:, None]
        if dtype == tl.float16:  # 1/|k| of a key that is all but zero can take u out of range
            b_u = tl.clamp(b_u, -65504.0, 65504.0)
        b_s = dot(tl.trans(b_k), b_u.to(dtype), b_s * decay, PRECISION=PRECISION)
    store_state(b_s, p_states, p_final, i_n, i_slot, i_h, o_k, o_v, is_last, HV, K, V, STATE_ONLY)


def chunk_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Chunked gated delta rule, one decay per head.

    Args:
        q, k: ``[B, T, HK, K]`` in float16, bfloat16 or float32; K up to 256. In bfloat16 their products, |k|^2 and
            scale |q| |k|, have the range of float16, 65,504; with qk_l2norm they are at most 1.
        v: ``[B, T, HV, V]`` in the same dtype, HV a multiple of HK; V up to 256.
        g: ``[B, T, HV]`` fp32, natural-log decay, at most 0.
        beta: ``[B, T, HV]``.
        scale: factor on the output.
        initial_state: ``[N, HV, K, V]``; zeros when None.
        cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T (then B is 1), on the tensors' device.
        qk_l2norm: normalise q and k over K first, x / sqrt(sum x^2 + 1e-6).

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` in v's dtype and ``[N, HV, K, V]`` in fp32.
    """
    B, T, HK, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    BK = padded(K)
    precision = input_precision(v.dtype)
    chunks = chunks_of(B, T, cu_seqlens)
    a, p = (torch.empty(B, T, HV, CHUNK, dtype=v.dtype, device=v.device) for _ in range(2))
    kin, qin, kout = torch.empty(3, B, T, HV, dtype=torch.float32, device=v.device)
    decay = torch.empty(chunks.programs, HV, dtype=torch.float32, device=v.device)
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    final_state = torch.empty(N, HV, K, V, dtype=torch.float32, device=v.device)
    shape = dict(T=T, HK=HK, HV=HV, K=K, BT=CHUNK, BK=BK)
    with on_device(v):
        if B * T > 0:
            _prepare_kernel[(chunks.programs, HK)](
                p_q=q,
                p_k=k,
                p_g=g,
                p_beta=beta,
                p_a=a,
                p_p=p,
                p_kin=kin,
                p_qin=qin,
                p_kout=kout,
                p_decay=decay,
                scale=scale,
                **strides(q=q, k=k, g=g, b=beta),
                BC=HALF,
                INSIDE=OPERANDS[v.dtype],
                PRECISION=precision,
                QK_L2NORM=qk_l2norm,
                num_warps=PREPARE_WARPS[v.dtype],
                num_stages=PREPARE_STAGES,
                **chunks.arguments(),
                **dict(shape, BK=min(BK, PREPARE_TILE)),
            )
    if N > 0:
        scan(
            _scan_kernel,
            inputs=dict(p_k=k, p_v=v, p_a=a, p_kin=kin, p_kout=kout, p_decay=decay, **strides(q=q, k=k, v=v), HK=HK),
            outputs=dict(p_q=q, p_p=p, p_qin=qin, p_o=o),
            v=v,
            initial_state=initial_state,
            final_state=final_state,
            chunks=chunks,
            key_tiles=2,
        )
    return o, final_state


register(Kernel("chunk_gdn", "triton", chunk_gdn, why_not))
