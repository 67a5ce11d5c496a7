"""The gated delta rule in chunks of 64 tokens, one decay per head (GDN): prefill.

Per sequence and value head, G the running sum of g inside a chunk, S the state [K, V] before it:

    A = D (I + tril(beta K K^T, -1))^-1 D^-1 diag(beta) ,  D = diag(e^G)         (the inverse is free of the gate)
    P = scale * tril(Q K^T) e^(G_i - G_j)
    u = A (V - e^G K S) ;  O = scale e^G Q S + P u ;  S <- e^(G_last) S + K^T (e^(G_last - G) u)

The oracle is `hf_gdn.kernels.reference.delta_rule`; docs/delta_rule.md derives the form. Two kernels prepare A and P
of all chunks at once, a third walks the chunks of a sequence, or of a segment of one (`segments`), with S in registers.

With qk_l2norm q and k are never written: 1/|q| and 1/|k| are numbers per token, and join those of the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Kernel, register
from .chunk_common import (
    CHUNK,
    chunks_of,
    dot,
    input_precision,
    invert_unit_lower,
    locate_chunk,
    padded,
    strides,
)
from .launch import on_device, tl, triton, why_not
from .segments import load_state, locate_segment, scan, store_state

# By padded K, so that nothing spills (A100 at 256: 80 bytes). Not yet timed.
PREPARE_WARPS = {16: 4, 32: 4, 64: 4, 128: 4, 256: 8}


@triton.jit
def _load_sum(p_g, m_t):
    """Running sum of the log-decay and its last value, each as two fp32 numbers: ``(high, low, last high, last low)``.

    In the difference of two long fp32 sums a small decay would drown; as two numbers each sum keeps it.
    """
    b_g = tl.load(p_g, mask=m_t, other=0.0).to(tl.float64)
    b_sum = tl.cumsum(b_g, 0)
    last = tl.sum(b_g, 0)
    b_high, last_high = b_sum.to(tl.float32), last.to(tl.float32)
    return b_high, (b_sum - b_high).to(tl.float32), last_high, (last - last_high).to(tl.float32)


@triton.jit
def _gate(b_high, b_low, BT: tl.constexpr):
    """e^(G_i - G_j), [BT, BT], and zero above the diagonal."""
    o_i = tl.arange(0, BT)
    b_gap = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    return tl.exp(tl.where(o_i[:, None] >= o_i[None, :], b_gap, float("-inf")))


@triton.jit
def _inverse_norm(b_x, QK_L2NORM: tl.constexpr):
    """1 / |row|, or 1 when rows are not to be normalised."""
    if QK_L2NORM:
        b_norm = tl.rsqrt(tl.sum(b_x.to(tl.float32) * b_x.to(tl.float32), 1) + 1e-6)
    else:
        b_norm = tl.full([b_x.shape[0]], 1.0, tl.float32)
    return b_norm


@triton.jit
def _inverse_kernel(
    p_k,  # [B, T, HK, K]
    p_g,  # [B, T, HV]
    p_beta,  # [B, T, HV]
    p_a,  # [B, T, HV, 64]
    p_kin,  # [B, T, HV]  e^G / |k|
    p_kout,  # [B, T, HV]  e^(G_last - G) / |k|
    p_decay,  # [chunks, HV]  e^(G_last)
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    T,
    stride_kb, stride_kt, stride_kh,
    stride_gb, stride_gt, stride_gh,
    stride_bb, stride_bt, stride_bh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    MERGE: tl.constexpr,
    PRECISION: tl.constexpr,
    QK_L2NORM: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_t = i_t + o_i
    m_t = o_t < end
    p_k += i_b * stride_kb + i_h // (HV // HK) * stride_kh
    b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_t[:, None] & (o_k < K)[None, :], other=0.0)
    b_norm = _inverse_norm(b_k, QK_L2NORM)
    b_beta = tl.load(p_beta + i_b * stride_bb + i_h * stride_bh + o_t * stride_bt, mask=m_t, other=0.0).to(tl.float32)
    b_kk = dot(b_k, tl.trans(b_k), PRECISION=PRECISION) * (b_beta * b_norm)[:, None] * b_norm[None, :]
    b_a = invert_unit_lower(tl.where(o_i[:, None] > o_i[None, :], b_kk, 0.0), MERGE, PRECISION)

    b_high, b_low, high, low = _load_sum(p_g + i_b * stride_gb + i_h * stride_gh + o_t * stride_gt, m_t)
    b_a *= _gate(b_high, b_low, BT) * b_beta[None, :]
    o_row = (i_b * T + o_t) * HV + i_h
    tl.store(p_a + o_row[:, None] * BT + o_i[None, :], b_a.to(p_a.dtype.element_ty), mask=m_t[:, None])
    tl.store(p_kin + o_row, tl.exp(b_high) * b_norm, mask=m_t)
    tl.store(p_kout + o_row, tl.exp((high - b_high) + (low - b_low)) * b_norm, mask=m_t)
    tl.store(p_decay + i_chunk * HV + i_h, tl.exp(high))


@triton.jit
def _scores_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_g,  # [B, T, HV]
    p_p,  # [B, T, HV, 64]
    p_qin,  # [B, T, HV]  scale e^G / |q|
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    scale,
    T,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_gb, stride_gt, stride_gh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    QK_L2NORM: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0).to(tl.int64)
    i_hk = tl.program_id(1).to(tl.int64)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_t = i_t + o_i
    m_t = o_t < end
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    p_q += i_b * stride_qb + i_hk * stride_qh
    p_k += i_b * stride_kb + i_hk * stride_kh
    b_q = tl.load(p_q + o_t[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)
    b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)
    b_norm = _inverse_norm(b_q, QK_L2NORM) * scale
    b_qk = dot(b_q, tl.trans(b_k), PRECISION=PRECISION) * b_norm[:, None] * _inverse_norm(b_k, QK_L2NORM)[None, :]
    # One product for all value heads of the key head.
    for i_h in range(i_hk * (HV // HK), (i_hk + 1) * (HV // HK)):
        b_high, b_low, _, _ = _load_sum(p_g + i_b * stride_gb + i_h * stride_gh + o_t * stride_gt, m_t)
        o_row = (i_b * T + o_t) * HV + i_h
        b_p = b_qk * _gate(b_high, b_low, BT)
        tl.store(p_p + o_row[:, None] * BT + o_i[None, :], b_p.to(p_p.dtype.element_ty), mask=m_t[:, None])
        tl.store(p_qin + o_row, tl.exp(b_high) * b_norm, mask=m_t)


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
        q, k: ``[B, T, HK, K]`` in float16, bfloat16 or float32; K up to 256.
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
            _inverse_kernel[(chunks.programs, HV)](
                p_k=k,
                p_g=g,
                p_beta=beta,
                p_a=a,
                p_kin=kin,
                p_kout=kout,
                p_decay=decay,
                **strides(k=k, g=g, b=beta),
                # fp16 has too little range for the products of the inverse; bf16 merges as accurately as it stores.
                MERGE=tl.bfloat16 if v.dtype == torch.bfloat16 else tl.float32,
                PRECISION=precision,
                QK_L2NORM=qk_l2norm,
                num_warps=PREPARE_WARPS[BK],
                **chunks.arguments(),
                **shape,
            )
            _scores_kernel[(chunks.programs, HK)](
                p_q=q,
                p_k=k,
                p_g=g,
                p_p=p,
                p_qin=qin,
                scale=scale,
                **strides(q=q, k=k, g=g),
                PRECISION=precision,
                QK_L2NORM=qk_l2norm,
                num_warps=PREPARE_WARPS[BK],
                **chunks.arguments(),
                **shape,
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
