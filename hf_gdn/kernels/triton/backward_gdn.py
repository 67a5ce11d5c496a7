"""The gradients of the chunked gated delta rule, one decay per head (GDN).

With the names of `chunk_gdn`, M = -tril(K K^T e^(G_i - G_j), -1), and X' the gradient of X (docs/delta_rule.md):

    u' = P^T O' + e^(G_last - G) K S_next' ;  r' = V' = A^T u'
    S' = e^(G_last) S_next' + (scale e^G Q)^T O' - (e^G K)^T r'
    P' = tril(O' u^T) ;  M' = tril(r' u^T, -1) ;  beta' = sum_V (r + M u) (u' + M^T r')

The oracle is autograd through `hf_gdn.kernels.reference.delta_rule`. All is computed again from the inputs, in five
steps: `chunk_gdn_prepare`; a scan that writes the state before every chunk and u, and one from the last chunk to the
first that writes the gradient of the state after every chunk and r' (`backward_scans`); a kernel per chunk and value
head for the gradients of the scores, g and beta; and one per chunk and key head for those of q and k, which sums over
value heads, so that no two programs add to the same gradient.

No product takes the transposed result of another one, which is wrong on Hopper with Triton 3.4 to 3.7.0: what has to be
transposed is loaded, or M, whose transpose is computed from the symmetric K K^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import Gradients
from .backward_scans import scans
from .chunk_gdn import prepare
from .chunks import CHUNK, chunks_of, locate_chunk, padded
from .l2norm_backward import outside
from .math import LOG2E, dot, input_precision
from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, on_device, strides, tl, triton, why_not_chunk


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(LaunchConfig):
    """Launch parameters of the kernel for the scores: BV columns of V per step."""

    BV: int


@dataclass(frozen=True, kw_only=True)
class KeysConfig(LaunchConfig):
    """Launch parameters of the kernel for q and k.

    Args:
        BK: channels per program.
        BV: columns of V per step.
        num_stages: pipeline stages of the loads.
    """

    BK: int
    BV: int
    num_stages: int


SCORES_CONFIG = ScoresConfig(BV=16, num_warps=8, measured_on=NOT_MEASURED)
KEYS_CONFIG = KeysConfig(BK=64, BV=32, num_warps=8, num_stages=2, measured_on=NOT_MEASURED)


@triton.jit
def _gates(p_g, stride, m_t, BT: tl.constexpr):
    """e^(G_i - G_j) ``[BT, BT]`` for i > j, else 0, and its transpose. Sums as in `chunk_gdn_prepare`."""
    b_g = tl.load(p_g + tl.arange(0, BT).to(tl.int64) * stride, mask=m_t, other=0.0)
    b_g = tl.where(b_g < -1e3, -1e3, b_g).to(tl.float64) * LOG2E
    b_sum = tl.cumsum(b_g, 0)
    b_high = b_sum.to(tl.float32)
    b_low = (b_sum - b_high).to(tl.float32)
    b_gap = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    o_i = tl.arange(0, BT)
    m_lower, m_upper = o_i[:, None] > o_i[None, :], o_i[:, None] < o_i[None, :]
    b_gate = tl.exp2(tl.where(m_lower, b_gap, float("-inf")))
    return b_gate, tl.exp2(tl.where(m_upper, -b_gap, float("-inf")))


@triton.jit(do_not_specialize=["T"])
def _score_gradients_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_v,  # [B, T, HV, V]
    p_g,  # [B, T, HV]
    p_p,  # [B, T, HV, 64]
    p_kin,  # [B, T, HV]
    p_qin,  # [B, T, HV]
    p_kout,  # [B, T, HV]
    p_decay,  # [chunks, HV]
    p_u,  # [B, T, HV, V] contiguous
    p_do,  # [B, T, HV, V] contiguous
    p_dr,  # [B, T, HV, V] contiguous
    p_states,  # [chunks, HV, K, V]
    p_dstates,  # [chunks, HV, K, V]
    p_dqk,  # [B, T, HV, 64], the gradient of Q K^T
    p_dkk,  # [B, T, HV, 64], that of K K^T below the diagonal
    p_dg,  # [B, T, HV] contiguous
    p_dbeta,  # [B, T, HV] contiguous
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
    stride_vb,
    stride_vt,
    stride_vh,
    stride_gb,
    stride_gt,
    stride_gh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_hk = i_h // (HV // HK)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    o_i = tl.arange(0, BT)
    o_t = i_t + o_i
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_t, m_k = o_t < end, o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    dtype = p_v.dtype.element_ty
    o_row = (i_b * T + o_t) * HV + i_h
    o_tile = o_row[:, None] * BT + o_i[None, :]
    o_state = (i_chunk * HV + i_h) * K * V
    p_v += i_b * stride_vb + i_h * stride_vh
    b_q = tl.load(p_q + i_b * stride_qb + i_hk * stride_qh + o_t[:, None] * stride_qt + o_k[None, :], m_tk, 0.0)
    b_k = tl.load(p_k + i_b * stride_kb + i_hk * stride_kh + o_t[:, None] * stride_kt + o_k[None, :], m_tk, 0.0)
    b_qin = tl.load(p_qin + o_row, mask=m_t, other=0.0)
    b_kin = tl.load(p_kin + o_row, mask=m_t, other=0.0)
    b_kout = tl.load(p_kout + o_row, mask=m_t, other=0.0)
    b_gate, b_gatet = _gates(p_g + i_b * stride_gb + i_t * stride_gt + i_h * stride_gh, stride_gt, m_t, BT)
    b_kk = dot(b_k, tl.trans(b_k), PRECISION=PRECISION)
    b_m, b_mt = (-b_kk * b_gate).to(dtype), (-b_kk * b_gatet).to(dtype)
    b_gate = b_gate.to(dtype)  # half the registers
    b_p = tl.load(p_p + o_tile, mask=m_t[:, None], other=0.0)

    b_dp = tl.zeros([BT, BT], tl.float32)
    b_dm = tl.zeros([BT, BT], tl.float32)
    b_row = tl.zeros([BT], tl.float32)
    b_end = tl.zeros([BT], tl.float32)
    b_dbeta = tl.zeros([BT], tl.float32)
    b_whole = tl.zeros([BK], tl.float32)
    for i_v in range(0, V, BV):
        m_v = i_v + o_v < V
        m_tv, m_s = m_t[:, None] & m_v[None, :], m_k[:, None] & m_v[None, :]
        o_tv = o_row[:, None] * V + i_v + o_v[None, :]
        o_s = o_state + o_k[:, None] * V + i_v + o_v[None, :]
        b_u = tl.load(p_u + o_tv, mask=m_tv, other=0.0)
        b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0)
        b_dr = tl.load(p_dr + o_tv, mask=m_tv, other=0.0)
        b_v = tl.load(p_v + o_t[:, None] * stride_vt + i_v + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
        b_s = tl.load(p_states + o_s, mask=m_s, other=0.0)
        b_ds = tl.load(p_dstates + o_s, mask=m_s, other=0.0)
        b_whole += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
        b_dp = dot(b_do, tl.trans(b_u), b_dp, PRECISION=PRECISION)
        b_dm = dot(b_dr, tl.trans(b_u), b_dm, PRECISION=PRECISION)
        b_read = dot(b_q, b_s, PRECISION=PRECISION) * b_qin[:, None]
        b_row += tl.sum(b_do.to(tl.float32) * b_read, 1)
        b_read = dot(b_k, b_s, PRECISION=PRECISION) * -b_kin[:, None]
        b_row += tl.sum(b_dr.to(tl.float32) * b_read, 1)
        b_w = dot(b_m, b_u, b_v + b_read, PRECISION=PRECISION)
        b_z = dot(b_k, b_ds, PRECISION=PRECISION) * b_kout[:, None]
        b_end += tl.sum(b_u.to(tl.float32) * b_z, 1)
        b_z = dot(tl.trans(b_p), b_do, b_z, PRECISION=PRECISION)
        b_z = dot(b_mt, b_dr, b_z, PRECISION=PRECISION)
        b_dbeta += tl.sum(b_w * b_z, 1)

    m_same = o_i[:, None] == o_i[None, :]
    b_x = tl.where(m_same, 0.0, b_dp * b_p.to(tl.float32)) + b_dm * b_m.to(tl.float32)  # nothing decays on the diagonal
    b_row += tl.sum(b_x, 1)
    b_row -= tl.sum(b_x, 0)
    b_gate = b_gate.to(tl.float32)
    tl.store(p_dkk + o_tile, (b_dm * -b_gate).to(dtype), mask=m_t[:, None])
    b_dp *= tl.where(m_same, 1.0, b_gate) * scale
    tl.store(p_dqk + o_tile, b_dp.to(dtype), mask=m_t[:, None])

    # A decay multiplies all from its row on: sums over rows, and no difference of two sums.
    b_dg = tl.sum(tl.where(o_i[:, None] <= o_i[None, :], b_row[None, :], 0.0), 1)
    b_dg += tl.sum(tl.where(o_i[:, None] > o_i[None, :], b_end[None, :], 0.0), 1)
    b_dg += tl.sum(b_whole, 0) * tl.load(p_decay + i_chunk * HV + i_h)
    tl.store(p_dg + o_row, b_dg.to(p_dg.dtype.element_ty), mask=m_t)
    tl.store(p_dbeta + o_row, b_dbeta.to(p_dbeta.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["T"])
def _key_gradients_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_kin,  # [B, T, HV]
    p_qin,  # [B, T, HV]
    p_kout,  # [B, T, HV]
    p_u,  # [B, T, HV, V] contiguous
    p_do,  # [B, T, HV, V] contiguous
    p_dr,  # [B, T, HV, V] contiguous
    p_states,  # [chunks, HV, K, V]
    p_dstates,  # [chunks, HV, K, V]
    p_dqk,  # [B, T, HV, 64]
    p_dkk,  # [B, T, HV, 64]
    p_dq,  # [B, T, HK, K] contiguous
    p_dk,  # [B, T, HK, K] contiguous
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    T,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_hk = tl.program_id(1).to(tl.int64)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    o_i = tl.arange(0, BT)
    o_t = i_t + o_i
    o_k = tl.program_id(2) * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_t, m_k = o_t < end, o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    dtype = p_do.dtype.element_ty
    b_q = tl.load(p_q + i_b * stride_qb + i_hk * stride_qh + o_t[:, None] * stride_qt + o_k[None, :], m_tk, 0.0)
    b_k = tl.load(p_k + i_b * stride_kb + i_hk * stride_kh + o_t[:, None] * stride_kt + o_k[None, :], m_tk, 0.0)
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    for i_h in tl.range(i_hk * (HV // HK), (i_hk + 1) * (HV // HK), num_stages=1):
        o_row = (i_b * T + o_t) * HV + i_h
        o_state = (i_chunk * HV + i_h) * K * V
        b_qin = tl.load(p_qin + o_row, mask=m_t, other=0.0)
        b_kin = tl.load(p_kin + o_row, mask=m_t, other=0.0)
        b_kout = tl.load(p_kout + o_row, mask=m_t, other=0.0)
        for i_v in range(0, V, BV):
            m_v = i_v + o_v < V
            m_tv, m_s = m_t[:, None] & m_v[None, :], m_k[:, None] & m_v[None, :]
            o_tv = o_row[:, None] * V + i_v + o_v[None, :]
            o_s = o_state + o_k[:, None] * V + i_v + o_v[None, :]
            b_s = tl.load(p_states + o_s, mask=m_s, other=0.0)
            b_x = tl.load(p_do + o_tv, mask=m_tv, other=0.0).to(tl.float32) * b_qin[:, None]
            b_dq = dot(b_x.to(dtype), tl.trans(b_s), b_dq, PRECISION=PRECISION)
            b_x = tl.load(p_dr + o_tv, mask=m_tv, other=0.0).to(tl.float32) * -b_kin[:, None]
            b_dk = dot(b_x.to(dtype), tl.trans(b_s), b_dk, PRECISION=PRECISION)
            b_ds = tl.load(p_dstates + o_s, mask=m_s, other=0.0)
            b_x = tl.load(p_u + o_tv, mask=m_tv, other=0.0).to(tl.float32) * b_kout[:, None]
            b_dk = dot(b_x.to(dtype), tl.trans(b_ds), b_dk, PRECISION=PRECISION)
        o_tile = o_row[:, None] * BT + o_i[None, :]
        b_dqk = tl.load(p_dqk + o_tile, mask=m_t[:, None], other=0.0)
        b_dkk = tl.load(p_dkk + o_tile, mask=m_t[:, None], other=0.0)
        b_dq = dot(b_dqk, b_k, b_dq, PRECISION=PRECISION)
        b_dk = dot(tl.trans(b_dqk), b_q, b_dk, PRECISION=PRECISION)
        b_dk = dot(b_dkk, b_k, b_dk, PRECISION=PRECISION)
        b_dk = dot(tl.trans(b_dkk), b_k, b_dk, PRECISION=PRECISION)
    o_tk = ((i_b * T + o_t) * HK + i_hk)[:, None] * K + o_k[None, :]
    tl.store(p_dq + o_tk, b_dq.to(dtype), mask=m_tk)
    tl.store(p_dk + o_tk, b_dk.to(dtype), mask=m_tk)


@outside
def backward_gdn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    d_o: Tensor,
    d_final_state: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    saved: Tensor | None = None,
) -> Gradients:
    """Gradients of the chunked gated delta rule, one decay per head.

    Args:
        q, k, v, g, beta, scale, initial_state, cu_seqlens: as in `chunk_gdn`.
        d_o: ``[B, T, HV, V]`` in v's dtype, contiguous.
        d_final_state: ``[N, HV, K, V]`` in fp32, contiguous.
        saved: not used.
        qk_l2norm: as in the forward; q and k are normalised outside of the kernels.

    Returns:
        Gradients of q, k, v, g, beta and the initial state, None where none was given.
    """
    B, T, HK, K = q.shape
    HV, V = v.shape[2:]
    BK = padded(K)
    chunks = chunks_of(B, T, cu_seqlens)

    def empty(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=v.device)

    made = prepare(q, k, v, g, beta, chunks, scale, False)
    done = scans(q, k, v, made, d_o, d_final_state, initial_state, chunks, key_tiles=2)
    d_qk, d_kk = (empty(B, T, HV, CHUNK) for _ in range(2))
    d_q, d_k = (empty(B, T, HK, K) for _ in range(2))
    d_g, d_beta = empty(B, T, HV, dtype=g.dtype), empty(B, T, HV, dtype=beta.dtype)
    shape = dict(T=T, HK=HK, HV=HV, K=K, V=V, BT=CHUNK, BK=BK, PRECISION=input_precision(v.dtype))
    with on_device(v):
        if B * T > 0:
            common = dict(
                p_q=q,
                p_k=k,
                p_kin=made.kin,
                p_qin=made.qin,
                p_kout=made.kout,
                p_u=done.u,
                p_do=d_o,
                p_dr=done.d_v,
                p_states=done.states,
                p_dstates=done.d_states,
                p_dqk=d_qk,
                p_dkk=d_kk,
                **strides(q=q, k=k),
                **chunks.arguments(),
                **shape,
            )
            BV = min(padded(V), SCORES_CONFIG.BV)
            launch(
                _score_gradients_kernel,
                (chunks.programs, HV),
                p_v=v,
                p_g=g,
                p_p=made.p,
                p_decay=made.decay,
                p_dg=d_g,
                p_dbeta=d_beta,
                scale=scale,
                **strides(v=v, g=g),
                BV=BV,
                num_warps=SCORES_CONFIG.num_warps,
                num_stages=1,
                **common,
            )
            BK = min(BK, KEYS_CONFIG.BK)
            common |= dict(BK=BK, BV=min(padded(V), KEYS_CONFIG.BV))
            launch(
                _key_gradients_kernel,
                (chunks.programs, HK, cdiv(K, BK)),
                p_dq=d_q,
                p_dk=d_k,
                num_warps=KEYS_CONFIG.num_warps,
                num_stages=KEYS_CONFIG.num_stages,
                **common,
            )
    return Gradients(d_q, d_k, done.d_v, d_g, d_beta, done.d_initial)


register(Kernel("backward_gdn", "triton", backward_gdn, why_not_chunk, checked=True))
