"""The gradients of the chunked delta rule with one decay per channel (KDA).

The scans are those of `backward_gdn`, with q and k multiplied by their decays. Two kernels follow. The first computes
the gradients of the scores N and P of a chunk, and that of beta. The second serves a tile of channels: with X' the
gradient of X, in every channel,

    row_i = sum_j N'_ij k_j e^(G_i - G_j) ;  column_j = sum_i (scale P'_ij q_i + N'_ij k_i) e^(G_i - G_j)
    q'_i = scale sum_j P'_ij k_j e^(G_i - G_j) + scale e^(G_i) (O' S^T)_i
    k'_i = row_i + column_i - e^(G_i) (r' S^T)_i + e^(G_last - G_i) (u S_next'^T)_i

and G's gradient is q q' + k (row - column), each part summed over the rows that a decay reaches.

Gates have no lower bound, so every e^(G_i - G_j) is split at a row between its two. For rows of a 16-row block and
columns before it, this is the block's first row: one product for each block. Inside of blocks, columns are taken one by
one. All exponents are sums of the gates between two rows, never differences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import Gradients
from .backward_scans import scans
from .chunk_kda import prepare
from .chunks import CHUNK, chunks_of, locate_chunk, padded
from .l2norm_backward import outside
from .math import LOG2E, dot, input_precision
from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, on_device, strides, tl, triton, why_not_chunk

_BLOCK = tl.constexpr(16)


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(LaunchConfig):
    """Launch parameters of the kernel for the scores: BV columns of V per step."""

    BV: int


@dataclass(frozen=True, kw_only=True)
class ChannelsConfig(LaunchConfig):
    """Launch parameters of the kernel for the channels: BK channels per program, BV columns of V per step."""

    BK: int
    BV: int


SCORES_CONFIG = ScoresConfig(BV=32, num_warps=8, measured_on=NOT_MEASURED)
CHANNELS_CONFIG = ChannelsConfig(BK=16, BV=32, num_warps=4, measured_on=NOT_MEASURED)


@triton.jit(do_not_specialize=["T"])
def _score_gradients_kernel(
    p_v,  # [B, T, HV, V]
    p_p,  # [B, T, HV, 64]
    p_n,  # [B, T, HV, 64] fp32
    p_kin,  # [B, T, HV, K]
    p_kout,  # [B, T, HV, K]
    p_u,  # [B, T, HV, V] contiguous
    p_do,  # [B, T, HV, V] contiguous
    p_dr,  # [B, T, HV, V] contiguous
    p_states,  # [chunks, HV, K, V]
    p_dstates,  # [chunks, HV, K, V]
    p_dp,  # [B, T, HV, 64], of P times scale, strictly lower
    p_dn,  # [B, T, HV, 64], of N, strictly lower
    p_own,  # [B, T, HV] fp32, of the diagonal of P, times scale
    p_dbeta,  # [B, T, HV] contiguous
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    scale,
    T,
    stride_vb,
    stride_vt,
    stride_vh,
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
    o_tk = o_row[:, None] * K + o_k[None, :]
    o_tile = o_row[:, None] * BT + o_i[None, :]
    o_state = (i_chunk * HV + i_h) * K * V
    p_v += i_b * stride_vb + i_h * stride_vh
    b_kin = tl.load(p_kin + o_tk, mask=m_tk, other=0.0)
    b_kout = tl.load(p_kout + o_tk, mask=m_tk, other=0.0)
    b_m = (-tl.load(p_n + o_tile, mask=m_t[:, None], other=0.0)).to(dtype)
    b_p = tl.load(p_p + o_tile, mask=m_t[:, None], other=0.0)
    b_dp = tl.zeros([BT, BT], tl.float32)
    b_dm = tl.zeros([BT, BT], tl.float32)
    b_dbeta = tl.zeros([BT], tl.float32)
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
        b_dp = dot(b_do, tl.trans(b_u), b_dp, PRECISION=PRECISION)
        b_dm = dot(b_dr, tl.trans(b_u), b_dm, PRECISION=PRECISION)
        b_w = dot(b_m, b_u, b_v - dot(b_kin, b_s, PRECISION=PRECISION), PRECISION=PRECISION)
        b_z = dot(b_kout, b_ds, PRECISION=PRECISION)
        b_z = dot(tl.trans(b_p), b_do, b_z, PRECISION=PRECISION)
        b_z = dot(tl.trans(b_m), b_dr, b_z, PRECISION=PRECISION)
        b_dbeta += tl.sum(b_w * b_z, 1)
    m_lower = o_i[:, None] > o_i[None, :]
    b_own = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_dp, 0.0), 1)
    tl.store(p_own + o_row, b_own * scale, mask=m_t)
    tl.store(p_dp + o_tile, tl.where(m_lower, b_dp * scale, 0.0).to(dtype), mask=m_t[:, None])
    tl.store(p_dn + o_tile, tl.where(m_lower, -b_dm, 0.0).to(dtype), mask=m_t[:, None])
    tl.store(p_dbeta + o_row, b_dbeta.to(p_dbeta.dtype.element_ty), mask=m_t)


@triton.jit
def _by_block(b_x, BT: tl.constexpr):
    """``[BT, BK]`` as ``[BT / 16, 16, BK]``."""
    return tl.reshape(b_x, [BT // _BLOCK, _BLOCK, b_x.shape[1]])


@triton.jit(do_not_specialize=["T"])
def _channel_gradients_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_g,  # [B, T, HV, K]
    p_decay,  # [chunks, HV, K]
    p_u,  # [B, T, HV, V] contiguous
    p_do,  # [B, T, HV, V] contiguous
    p_dr,  # [B, T, HV, V] contiguous
    p_states,  # [chunks, HV, K, V]
    p_dstates,  # [chunks, HV, K, V]
    p_dp,  # [B, T, HV, 64]
    p_dn,  # [B, T, HV, 64]
    p_own,  # [B, T, HV]
    p_dq,  # [B, T, HK, K] contiguous
    p_dk,  # [B, T, HK, K] contiguous
    p_dg,  # [B, T, HV, K] contiguous
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
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_hk = tl.program_id(1).to(tl.int64)
    i_k = tl.program_id(2) * BK
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    if i_t >= end:
        return
    o_i = tl.arange(0, BT)
    o_t = i_t + o_i
    o_k = i_k + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_t, m_k = o_t < end, o_k < K
    m_tk = m_t[:, None] & m_k[None, :]
    o_in, o_block = o_i % _BLOCK, o_i // _BLOCK * _BLOCK  # row of a block, and the block's first row
    dtype = p_do.dtype.element_ty
    p_q += i_b * stride_qb + i_hk * stride_qh
    p_k += i_b * stride_kb + i_hk * stride_kh
    b_q = tl.load(p_q + o_t[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dk = tl.zeros([BT, BK], tl.float32)
    for i_h in tl.range(i_hk * (HV // HK), (i_hk + 1) * (HV // HK), num_stages=1):
        o_row = (i_b * T + o_t) * HV + i_h
        i_state = i_chunk * HV + i_h
        p_gh = p_g + i_b * stride_gb + i_h * stride_gh
        b_g = tl.load(p_gh + o_t[:, None] * stride_gt + o_k[None, :], mask=m_tk, other=0.0) * LOG2E
        m_next = ((o_i < BT - 1) & (o_t + 1 < end))[:, None] & m_k[None, :]
        b_next = tl.load(p_gh + (o_t[:, None] + 1) * stride_gt + o_k[None, :], mask=m_next, other=0.0) * LOG2E

        # The states before and after the chunk.
        b_read = tl.zeros([BT, BK], tl.float32)
        b_key = tl.zeros([BT, BK], tl.float32)
        b_written = tl.zeros([BT, BK], tl.float32)
        b_whole = tl.zeros([BK], tl.float32)
        for i_v in range(0, V, BV):
            m_v = i_v + o_v < V
            m_tv, m_s = m_t[:, None] & m_v[None, :], m_k[:, None] & m_v[None, :]
            o_tv = o_row[:, None] * V + i_v + o_v[None, :]
            o_s = i_state * K * V + o_k[:, None] * V + i_v + o_v[None, :]
            b_s = tl.load(p_states + o_s, mask=m_s, other=0.0)
            b_ds = tl.load(p_dstates + o_s, mask=m_s, other=0.0)
            b_whole += tl.sum(b_s.to(tl.float32) * b_ds.to(tl.float32), 1)
            b_do = tl.load(p_do + o_tv, mask=m_tv, other=0.0)
            b_read = dot(b_do, tl.trans(b_s), b_read, PRECISION=PRECISION)
            b_dr = tl.load(p_dr + o_tv, mask=m_tv, other=0.0)
            b_key = dot(b_dr, tl.trans(b_s), b_key, PRECISION=PRECISION)
            b_u = tl.load(p_u + o_tv, mask=m_tv, other=0.0)
            b_written = dot(b_u, tl.trans(b_ds), b_written, PRECISION=PRECISION)
        b_in = tl.exp2(tl.cumsum(b_g, 0))
        b_read *= b_in * scale
        b_row = b_key * -b_in
        b_written *= tl.exp2(tl.cumsum(b_next, 0, reverse=True))
        b_column = tl.zeros([BT, BK], tl.float32)

        # Scores between blocks, split at the first row of the later block.
        for i_r in tl.static_range(_BLOCK, BT, _BLOCK):
            m_early, m_rows = (o_i < i_r)[:, None], (o_block == i_r)[:, None]
            # Log-decay from rows before to the block's first row, and from there to rows of the block.
            b_up = tl.exp2(tl.cumsum(tl.where(o_i[:, None] < i_r, b_next, 0.0), 0, reverse=True))
            b_down = tl.exp2(tl.cumsum(tl.where(m_rows & (o_i > i_r)[:, None], b_g, 0.0), 0))
            o_rows = o_row[:, None] * BT + o_i[None, :]
            m_tile = (m_rows & m_t[:, None]) & (o_i < i_r)[None, :]
            b_dp = tl.load(p_dp + o_rows, mask=m_tile, other=0.0)
            b_dn = tl.load(p_dn + o_rows, mask=m_tile, other=0.0)
            b_kc = tl.where(m_early, b_k * b_up, 0.0).to(dtype)
            b_read += dot(b_dp, b_kc, PRECISION=PRECISION) * b_down
            b_row += dot(b_dn, b_kc, PRECISION=PRECISION) * b_down
            # Transposed by loading, not from registers.
            o_columns = o_row[None, :] * BT + o_i[:, None]
            m_tile = (o_i < i_r)[:, None] & ((o_block == i_r) & m_t)[None, :]
            b_dp = tl.load(p_dp + o_columns, mask=m_tile, other=0.0)
            b_dn = tl.load(p_dn + o_columns, mask=m_tile, other=0.0)
            b_x = dot(b_dp, tl.where(m_rows, b_q * b_down, 0.0).to(dtype), PRECISION=PRECISION)
            b_x = dot(b_dn, tl.where(m_rows, b_k * b_down, 0.0).to(dtype), b_x, PRECISION=PRECISION)
            b_column += tl.where(m_early, b_x * b_up, 0.0)

        # Scores inside of blocks, in all blocks at once, from their last columns to their first.
        b_log = tl.zeros([BT, BK], tl.float32)  # log-decay from the column to the rows after it
        for i in range(_BLOCK):
            i_j = _BLOCK - 1 - i
            o_j = o_block + i_j
            t_j = i_t + o_j
            m_after = o_in > i_j
            m_j = (m_after & (t_j + 1 < end))[:, None] & m_k[None, :]
            b_log += tl.load(p_gh + (t_j[:, None] + 1) * stride_gt + o_k[None, :], mask=m_j, other=0.0) * LOG2E
            b_gate = tl.where(m_after[:, None], tl.exp2(b_log), 0.0)
            b_dpj = tl.load(p_dp + o_row * BT + o_j, mask=m_t & m_after, other=0.0).to(tl.float32)
            b_dnj = tl.load(p_dn + o_row * BT + o_j, mask=m_t & m_after, other=0.0).to(tl.float32)
            m_j = (t_j < end)[:, None] & m_k[None, :]
            b_kj = tl.load(p_k + t_j[:, None] * stride_kt + o_k[None, :], mask=m_j, other=0.0).to(tl.float32) * b_gate
            b_read += b_dpj[:, None] * b_kj
            b_row += b_dnj[:, None] * b_kj
            b_kj = (b_dpj[:, None] * b_q + b_dnj[:, None] * b_k) * b_gate
            b_sum = tl.sum(_by_block(b_kj, BT), 1)[:, None, :]
            m_own = (tl.arange(0, _BLOCK) == i_j)[None, :, None]
            b_column += tl.reshape(tl.where(m_own, b_sum, 0.0), [BT, BK])

        # A decay multiplies all from its row on.
        b_dg = tl.cumsum(b_q * b_read + b_k * (b_row - b_column), 0, reverse=True)
        b_end = tl.where((o_t < end - 1)[:, None], b_k * b_written, 0.0)  # nothing decays after the last row
        b_dg += tl.cumsum(b_end, 0) - b_end
        b_dg += (b_whole * tl.load(p_decay + i_state * K + o_k, mask=m_k, other=0.0))[None, :]
        o_tk = o_row[:, None] * K + o_k[None, :]
        tl.store(p_dg + o_tk, b_dg.to(p_dg.dtype.element_ty), mask=m_tk)
        b_own = tl.load(p_own + o_row, mask=m_t, other=0.0)[:, None]
        b_dq += b_read + b_own * b_k
        b_dk += b_row + b_column + b_written + b_own * b_q
    o_tk = ((i_b * T + o_t) * HK + i_hk)[:, None] * K + o_k[None, :]
    tl.store(p_dq + o_tk, b_dq.to(dtype), mask=m_tk)
    tl.store(p_dk + o_tk, b_dk.to(dtype), mask=m_tk)


@outside
def backward_kda(
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
    """Gradients of the chunked delta rule with one decay per channel; the decay may be of any size.

    Args:
        q, k, v, g, beta, scale, initial_state, cu_seqlens: as in `chunk_kda`.
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

    made = prepare(q, k, v, g, beta, chunks, scale, False, all_n=True)
    done = scans(None, None, v, made, d_o, d_final_state, initial_state, chunks, key_tiles=3)
    d_p, d_n = (empty(B, T, HV, CHUNK) for _ in range(2))
    own = empty(B, T, HV, dtype=torch.float32)
    d_q, d_k = (empty(B, T, HK, K) for _ in range(2))
    d_g, d_beta = empty(B, T, HV, K, dtype=g.dtype), empty(B, T, HV, dtype=beta.dtype)
    shape = dict(T=T, HV=HV, K=K, V=V, BT=CHUNK, PRECISION=input_precision(v.dtype))
    with on_device(v):
        if B * T > 0:
            common = dict(
                p_u=done.u,
                p_do=d_o,
                p_dr=done.d_v,
                p_states=done.states,
                p_dstates=done.d_states,
                p_dp=d_p,
                p_dn=d_n,
                p_own=own,
                scale=scale,
                **chunks.arguments(),
                **shape,
            )
            launch(
                _score_gradients_kernel,
                (chunks.programs, HV),
                p_v=v,
                p_p=made.p,
                p_n=made.n,
                p_kin=made.kin,
                p_kout=made.kout,
                p_dbeta=d_beta,
                **strides(v=v),
                BK=BK,
                BV=min(SCORES_CONFIG.BV, padded(V)),
                num_warps=SCORES_CONFIG.num_warps,
                num_stages=1,
                **common,
            )
            BK = min(CHANNELS_CONFIG.BK, BK)
            launch(
                _channel_gradients_kernel,
                (chunks.programs, HK, cdiv(K, BK)),
                p_q=q,
                p_k=k,
                p_g=g,
                p_decay=made.decay,
                p_dq=d_q,
                p_dk=d_k,
                p_dg=d_g,
                **strides(q=q, k=k, g=g),
                HK=HK,
                BK=BK,
                BV=min(CHANNELS_CONFIG.BV, padded(V)),
                num_warps=CHANNELS_CONFIG.num_warps,
                num_stages=1,
                **common,
            )
    return Gradients(d_q, d_k, done.d_v, d_g, d_beta, done.d_initial)


register(Kernel("backward_kda", "triton", backward_kda, why_not_chunk, checked=True))
