"""The gated delta rule in chunks of 64 tokens, one decay per head (GDN): prefill.

Per sequence and value head, G the running sum of g inside a chunk, S the state [K, V] before it:

    A = (diag(1 / beta) + tril(K K^T e^(G_i - G_j), -1))^-1
    P = scale * tril(Q K^T) e^(G_i - G_j)
    u = A (V - e^G K S) ;  O = scale e^G Q S + P u ;  S <- e^(G_last) S + K^T (e^(G_last - G) u)

The oracle is `hf_gdn.kernels.reference.delta_rule`; docs/delta_rule.md derives the equations. `chunk_gdn_prepare`
computes A and P of all chunks in parallel. A second kernel then scans the chunks of a sequence, or of a segment of it
(`segmented_scan`), with S in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import Slots, check_slots
from .chunk_gdn_prepare import HALF, PREPARE_CONFIGS, prepare_kernel
from .chunks import CHUNK, Chunks, chunks_of, padded
from .math import dot, input_precision
from .prepared import launch
from .runtime import on_device, strides, tl, triton, why_not_chunk
from .segmented_scan import load_state, locate_segment, scan, store_state
from .triangular_inverse import OPERANDS


@triton.jit(do_not_specialize=["sequences", "minimum", "T"])
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
    p_states,  # [slots, HV, K, V + K], or None without segments
    p_final,  # [N, HV, K, V] contiguous, or None
    p_o,  # [B, T, HV, V] contiguous, or None to compute only the states of segments
    p_slots,  # [N] rows of p_initial and p_final, one pool whose rows are strided; or None for rows 0, 1, ...
    p_begun,  # [N], whether these hold states; or None
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_long,  # [sequences that may be long], or None
    sequences,
    minimum,
    stride_pool,
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
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    STATE_ONLY: tl.constexpr = p_o is None
    COLUMNS: tl.constexpr = V + K if STATE_ONLY else V
    # One grid axis, because y and z are limited to 65,535. Tiles of the same head are adjacent, so they share loads.
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
    if p_slots is not None:
        i_row = tl.load(p_slots + i_n)
        p_initial += i_row * stride_pool
        p_final += i_row * stride_pool
        b_s = load_state(p_initial, p_states, i_n * 0, i_s, i_slot, i_h, o_k, o_v, HV, K, V, SEGMENTS, STATE_ONLY)
        b_s = tl.where(tl.load(p_begun + i_n) != 0, b_s, 0.0)  # what a slot holds otherwise may be NaN
        is_last = is_last & (i_t < end)
        i_n = i_n * 0
    else:
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
        # Scale u instead of k, so that k is used as loaded.
        b_u *= b_kout[:, None]
        if dtype == tl.float16:  # 1 / |k| of a near-zero key can overflow
            b_u = tl.clamp(b_u, -65504.0, 65504.0)
        b_s = dot(tl.trans(b_k), b_u.to(dtype), b_s * decay, PRECISION=PRECISION)
    store_state(b_s, p_states, p_final, i_n, i_slot, i_h, o_k, o_v, is_last, HV, K, V, STATE_ONLY)


class Prepared(NamedTuple):
    """What `chunk_gdn_prepare` computes of a call's chunks."""

    a: Tensor  # [B, T, HV, 64]
    p: Tensor  # [B, T, HV, 64]
    kin: Tensor  # [B, T, HV]
    qin: Tensor  # [B, T, HV]
    kout: Tensor  # [B, T, HV]
    decay: Tensor  # [chunks, HV]


def prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, chunks: Chunks, scale: float, qk_l2norm: bool
) -> Prepared:
    """Prepare all chunks of a call, in parallel."""
    (B, T, HV, _), (HK, K) = v.shape, q.shape[2:]
    config = PREPARE_CONFIGS[v.dtype]
    a, p = (torch.empty(B, T, HV, CHUNK, dtype=v.dtype, device=v.device) for _ in range(2))
    kin, qin, kout = (torch.empty(B, T, HV, dtype=torch.float32, device=v.device) for _ in range(3))
    decay = torch.empty(chunks.programs, HV, dtype=torch.float32, device=v.device)
    with on_device(v):
        if B * T > 0:
            launch(
                prepare_kernel,
                (chunks.programs, HK),
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
                T=T,
                HK=HK,
                HV=HV,
                K=K,
                BT=CHUNK,
                BC=HALF,
                BK=min(padded(K), config.BK),
                INSIDE=OPERANDS[v.dtype],
                PRECISION=input_precision(v.dtype),
                QK_L2NORM=qk_l2norm,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                **chunks.arguments(),
            )
    return Prepared(a, p, kin, qin, kout, decay)


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
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunked gated delta rule, one decay per head.

    Args:
        q, k: ``[B, T, HK, K]`` in float16, bfloat16 or float32; K up to 256. In bfloat16, the products |k|^2 and
            scale |q| |k| are limited to the range of float16, 65,504; with qk_l2norm they are at most 1.
        v: ``[B, T, HV, V]`` in the same dtype, HV a multiple of HK; V up to 256.
        g: ``[B, T, HV]`` fp32, natural-log decay, at most 0.
        beta: ``[B, T, HV]``.
        scale: factor on the output.
        initial_state: ``[N, HV, K, V]``; zeros when None.
        cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T (then B is 1), on the tensors' device.
        qk_l2norm: L2-normalise q and k over K first, x / sqrt(sum x^2 + 1e-6).
        slots: `initial_state` is a pool fp32 ``[P, HV, K, V]``, read and written in place.

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` in v's dtype and ``[N, HV, K, V]`` in fp32.
    """
    (B, T, HV, V), (HK, K) = v.shape, q.shape[2:]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    chunks = chunks_of(B, T, cu_seqlens)
    made = prepare(q, k, v, g, beta, chunks, scale, qk_l2norm)
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    if slots is not None:
        final_state = check_slots(initial_state, torch.float32)
    else:
        final_state = torch.empty(N, HV, K, V, dtype=torch.float32, device=v.device)
    if N > 0:
        gates = dict(p_kin=made.kin, p_kout=made.kout, p_decay=made.decay)
        scan(
            _scan_kernel,
            inputs=dict(p_k=k, p_v=v, p_a=made.a, **gates, **strides(q=q, k=k, v=v), HK=HK),
            outputs=dict(p_q=q, p_p=made.p, p_qin=made.qin, p_o=o),
            v=v,
            initial_state=initial_state,
            final_state=final_state,
            chunks=chunks,
            slots=slots,
            key_tiles=2,
        )
    return o, final_state


register(Kernel("chunk_gdn", "triton", chunk_gdn, why_not_chunk, checked=True, slots=True))
