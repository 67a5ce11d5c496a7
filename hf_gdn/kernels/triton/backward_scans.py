"""The two scans over chunks of a backward: forward for the states and u, then backward for the states' gradients.

A program has BV columns of a state. The states before all chunks, and the gradients of the states after them, are
written in the inputs' dtype, in which products read them; they are gone after the backward. Equations: `backward_gdn`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chunks import CHUNK, Chunks, locate_sequence, padded, scan_config, shared_memory
from .math import dot, input_precision
from .prepared import launch
from .runtime import cdiv, on_device, strides, tl, triton


@triton.jit(do_not_specialize=["T"])
def states_kernel(
    p_k,  # [B, T, HK, K]; None with one decay per channel
    p_v,  # [B, T, HV, V]
    p_a,  # [B, T, HV, 64]
    p_kin,  # [B, T, HV]; with one decay per channel [B, T, HV, K], times k
    p_kout,  # as kin
    p_decay,  # [chunks, HV] or [chunks, HV, K]
    p_initial,  # [N, HV, K, V] contiguous, or None for zeros
    p_states,  # [chunks, HV, K, V], the state before every chunk
    p_u,  # [B, T, HV, V] contiguous
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    T,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    PER_CHANNEL: tl.constexpr = p_k is None
    i_program = tl.program_id(0)
    i_v = i_program % tl.cdiv(V, BV)
    i_nh = (i_program // tl.cdiv(V, BV)).to(tl.int64)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_b, i_t, end, i_chunk = locate_sequence(i_n, p_bounds, p_first, T)
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    dtype = p_v.dtype.element_ty
    b_s = tl.zeros([BK, BV], tl.float32)
    if p_initial is not None:
        b_s = tl.load(p_initial + (i_n * HV + i_h) * K * V + o_s, mask=m_s, other=0.0).to(tl.float32)
    p_v += i_b * stride_vb + i_h * stride_vh
    if not PER_CHANNEL:
        p_k += i_b * stride_kb + i_h // (HV // HK) * stride_kh
    for i_c in range(tl.cdiv(end - i_t, BT)):
        o_t = i_t + i_c * BT + o_i
        m_t = o_t < end
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        o_row = (i_b * T + o_t) * HV + i_h
        i_state = (i_chunk + i_c) * HV + i_h
        b_v = tl.load(p_v + o_t[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0)
        b_a = tl.load(p_a + o_row[:, None] * BT + o_i[None, :], mask=m_t[:, None], other=0.0)
        b_state = b_s.to(dtype)
        tl.store(p_states + i_state * K * V + o_s, b_state, mask=m_s)
        if PER_CHANNEL:
            o_tk = o_row[:, None] * K + o_k[None, :]
            b_kin = tl.load(p_kin + o_tk, mask=m_tk, other=0.0)
            b_kout = tl.load(p_kout + o_tk, mask=m_tk, other=0.0)
            b_decay = tl.load(p_decay + i_state * K + o_k, mask=m_k, other=0.0)
            b_u = b_v.to(tl.float32) - dot(b_kin, b_state, PRECISION=PRECISION)
            b_u = dot(b_a, b_u.to(dtype), PRECISION=PRECISION).to(dtype)
            b_s = dot(tl.trans(b_kout), b_u, b_s * b_decay[:, None], PRECISION=PRECISION)
        else:
            b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)
            b_in = tl.load(p_kin + o_row, mask=m_t, other=0.0)
            b_out = tl.load(p_kout + o_row, mask=m_t, other=0.0)
            b_u = b_v.to(tl.float32) - dot(b_k, b_state, PRECISION=PRECISION) * b_in[:, None]
            b_u = dot(b_a, b_u.to(dtype), PRECISION=PRECISION)
            b_write = b_u * b_out[:, None]
            if dtype == tl.float16:  # as in `chunk_gdn`
                b_write = tl.clamp(b_write, -65504.0, 65504.0)
            b_s *= tl.load(p_decay + i_state)
            b_s = dot(tl.trans(b_k), b_write.to(dtype), b_s, PRECISION=PRECISION)
            b_u = b_u.to(dtype)
        tl.store(p_u + o_row[:, None] * V + o_v[None, :], b_u, mask=m_tv)


@triton.jit(do_not_specialize=["T"])
def reverse_kernel(
    p_q,  # [B, T, HK, K]; None with one decay per channel
    p_k,  # [B, T, HK, K]; None with one decay per channel
    p_a,  # [B, T, HV, 64]
    p_p,  # [B, T, HV, 64]
    p_kin,  # [B, T, HV]; with one decay per channel [B, T, HV, K], times k
    p_qin,  # as kin, times q
    p_kout,  # as kin
    p_decay,  # [chunks, HV] or [chunks, HV, K]
    p_do,  # [B, T, HV, V] contiguous
    p_dfinal,  # [N, HV, K, V] contiguous
    p_dstates,  # [chunks, HV, K, V], the gradient of the state after every chunk
    p_dv,  # [B, T, HV, V] contiguous
    p_dinitial,  # [N, HV, K, V] contiguous, or None
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
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
    PER_CHANNEL: tl.constexpr = p_k is None
    i_program = tl.program_id(0)
    i_v = i_program % tl.cdiv(V, BV)
    i_nh = (i_program // tl.cdiv(V, BV)).to(tl.int64)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_b, i_t, end, i_chunk = locate_sequence(i_n, p_bounds, p_first, T)
    o_i = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    dtype = p_do.dtype.element_ty
    b_ds = tl.load(p_dfinal + (i_n * HV + i_h) * K * V + o_s, mask=m_s, other=0.0).to(tl.float32)
    if not PER_CHANNEL:
        p_q += i_b * stride_qb + i_h // (HV // HK) * stride_qh
        p_k += i_b * stride_kb + i_h // (HV // HK) * stride_kh
    chunks = tl.cdiv(end - i_t, BT)
    for i_r in range(chunks):
        i_c = chunks - 1 - i_r
        o_t = i_t + i_c * BT + o_i
        m_t = o_t < end
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        o_row = (i_b * T + o_t) * HV + i_h
        i_state = (i_chunk + i_c) * HV + i_h
        o_tile = o_row[:, None] * BT + o_i[None, :]
        b_a = tl.load(p_a + o_tile, mask=m_t[:, None], other=0.0)
        b_p = tl.load(p_p + o_tile, mask=m_t[:, None], other=0.0)
        b_do = tl.load(p_do + o_row[:, None] * V + o_v[None, :], mask=m_tv, other=0.0)
        b_state = b_ds.to(dtype)
        tl.store(p_dstates + i_state * K * V + o_s, b_state, mask=m_s)
        if PER_CHANNEL:
            o_tk = o_row[:, None] * K + o_k[None, :]
            b_kin = tl.load(p_kin + o_tk, mask=m_tk, other=0.0)
            b_qin = tl.load(p_qin + o_tk, mask=m_tk, other=0.0)
            b_kout = tl.load(p_kout + o_tk, mask=m_tk, other=0.0)
            b_decay = tl.load(p_decay + i_state * K + o_k, mask=m_k, other=0.0)
            b_du = dot(b_kout, b_state, PRECISION=PRECISION)
            b_du = dot(tl.trans(b_p), b_do, b_du, PRECISION=PRECISION)
            b_dr = dot(tl.trans(b_a), b_du.to(dtype), PRECISION=PRECISION)
            b_ds = dot(tl.trans(b_qin), b_do, b_ds * b_decay[:, None], PRECISION=PRECISION)
            b_ds = dot(tl.trans(b_kin), (-b_dr).to(dtype), b_ds, PRECISION=PRECISION)
        else:
            b_q = tl.load(p_q + o_t[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)
            b_k = tl.load(p_k + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)
            b_in = tl.load(p_kin + o_row, mask=m_t, other=0.0)
            b_read = tl.load(p_qin + o_row, mask=m_t, other=0.0)
            b_out = tl.load(p_kout + o_row, mask=m_t, other=0.0)
            b_du = dot(b_k, b_state, PRECISION=PRECISION) * b_out[:, None]
            b_du = dot(tl.trans(b_p), b_do, b_du, PRECISION=PRECISION)
            b_dr = dot(tl.trans(b_a), b_du.to(dtype), PRECISION=PRECISION)
            b_ds *= tl.load(p_decay + i_state)
            b_ds = dot(tl.trans(b_q), (b_do.to(tl.float32) * b_read[:, None]).to(dtype), b_ds, PRECISION=PRECISION)
            b_ds = dot(tl.trans(b_k), (b_dr * -b_in[:, None]).to(dtype), b_ds, PRECISION=PRECISION)
        tl.store(p_dv + o_row[:, None] * V + o_v[None, :], b_dr.to(dtype), mask=m_tv)
    if p_dinitial is not None:
        tl.store(p_dinitial + (i_n * HV + i_h) * K * V + o_s, b_ds, mask=m_s)


class Scanned(NamedTuple):
    """What the two scans write."""

    u: Tensor  # [B, T, HV, V]
    d_v: Tensor  # [B, T, HV, V], the gradient of v, which is also that of r
    states: Tensor  # [chunks, HV, K, V], the states before the chunks
    d_states: Tensor  # [chunks, HV, K, V], the gradients of the states after them
    d_initial: Tensor | None  # [N, HV, K, V]


def scans(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    made: Any,
    d_o: Tensor,
    d_final_state: Tensor,
    initial_state: Tensor | None,
    chunks: Chunks,
    key_tiles: int,
) -> Scanned:
    """Scan prepared chunks forward and back.

    Args:
        q, k: ``[B, T, HK, K]``; None with one decay per channel, where the factors of `made` have them.
        v, d_o: ``[B, T, HV, V]``.
        made: ``Prepared`` of `chunk_gdn` or `chunk_kda`.
        d_final_state, initial_state: ``[N, HV, K, V]``.
        chunks: the call's chunks.
        key_tiles: as in `scan_config`.
    """
    (B, T, HV, V), (N, _, K, _) = v.shape, d_final_state.shape
    BK = padded(K)
    u, d_v = (torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device) for _ in range(2))
    states, d_states = (torch.empty(chunks.programs, HV, K, V, dtype=v.dtype, device=v.device) for _ in range(2))
    d_initial = None if initial_state is None else torch.empty_like(d_final_state, dtype=initial_state.dtype)
    if N == 0:
        return Scanned(u, d_v, states, d_states, d_initial)
    BV, warps, stages = scan_config(N * HV, V, BK, v.element_size(), shared_memory(v.device), key_tiles)
    common = dict(
        p_k=k,
        p_a=made.a,
        p_kin=made.kin,
        p_kout=made.kout,
        p_decay=made.decay,
        p_bounds=chunks.bounds,
        p_first=chunks.first,
        **(dict.fromkeys(("stride_kb", "stride_kt", "stride_kh"), 0) if k is None else strides(k=k)),
        T=T,
        HK=HV if k is None else k.shape[2],
        HV=HV,
        K=K,
        V=V,
        BT=CHUNK,
        BK=BK,
        BV=BV,
        PRECISION=input_precision(v.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    with on_device(v):
        launch(
            states_kernel,
            (cdiv(V, BV) * N * HV,),
            p_v=v,
            p_initial=None if initial_state is None else initial_state.contiguous(),
            p_states=states,
            p_u=u,
            **strides(v=v),
            **common,
        )
        launch(
            reverse_kernel,
            (cdiv(V, BV) * N * HV,),
            p_q=q,
            p_p=made.p,
            p_qin=made.qin,
            p_do=d_o,
            p_dfinal=d_final_state,
            p_dstates=d_states,
            p_dv=d_v,
            p_dinitial=d_initial,
            **(dict.fromkeys(("stride_qb", "stride_qt", "stride_qh"), 0) if q is None else strides(q=q)),
            **common,
        )
    return Scanned(u, d_v, states, d_states, d_initial)
