"""The delta rule in chunks of 64 tokens with one decay per channel (Kimi delta attention, KDA): prefill.

Per sequence and value head, G the running sum of g [., K] inside a chunk, S the state [K, V] before it:

    N = tril(sum_d k_id k_jd e^(G_id - G_jd), -1) ;  A = (diag(1 / beta) + N)^-1
    P = scale * tril(sum_d q_id k_jd e^(G_id - G_jd))
    u = A (V - (e^G K) S) ;  O = scale (e^G Q) S + P u ;  S <- e^(G_last) S + (e^(G_last - G) K)^T u

The oracle is `hf_gdn.kernels.reference.delta_rule`; docs/delta_rule.md derives the equations.

`chunk_kda_prepare` computes A, P, and q and k multiplied by their decay from or to an end of the chunk.
`chunk_kda_strong_decay` serves the chunks that decay too much for it. The scan follows, with S in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import Slots, check_slots
from .chunk_kda_prepare import PREPARE_CONFIG, WIDEST, prepare_kernel
from .chunk_kda_strong_decay import INVERSE_CONFIG, SCORES_CONFIG, inverse_kernel, scores_kernel
from .chunks import CHUNK, Chunks, chunks_of, padded
from .math import dot, input_precision
from .prepared import launch
from .runtime import on_device, strides, tl, triton, why_not_chunk
from .segmented_scan import load_state, locate_segment, scan, store_state
from .triangular_inverse import OPERANDS


@triton.jit(do_not_specialize=["sequences", "minimum", "T"])
def _scan_kernel(
    p_v,  # [B, T, HV, V]
    p_a,  # [B, T, HV, 64]
    p_p,  # [B, T, HV, 64], or None
    p_qin,  # [B, T, HV, K], or None
    p_kin,  # [B, T, HV, K]
    p_kout,  # [B, T, HV, K]
    p_decay,  # [chunks, HV, K]
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
    stride_vb,
    stride_vt,
    stride_vh,
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

    p_v += i_b * stride_vb + i_h * stride_vh
    for i_c in range(tl.cdiv(end - i_t, BT)):
        o_t = i_t + i_c * BT + o_i
        m_t = o_t < end
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        o_row = (i_b * T + o_t) * HV + i_h
        o_tk = o_row[:, None] * K + o_k[None, :]
        o_tile = o_row[:, None] * BT + o_i[None, :]
        b_kin = tl.load(p_kin + o_tk, mask=m_tk, other=0.0)
        if not STATE_ONLY:
            b_qin = tl.load(p_qin + o_tk, mask=m_tk, other=0.0)
            b_p = tl.load(p_p + o_tile, mask=m_t[:, None], other=0.0)
        b_kout = tl.load(p_kout + o_tk, mask=m_tk, other=0.0)
        b_v = tl.load(p_v + o_t[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0)
        b_a = tl.load(p_a + o_tile, mask=m_t[:, None], other=0.0)
        b_decay = tl.load(p_decay + ((i_chunk + i_c) * HV + i_h) * K + o_k, mask=m_k, other=0.0)

        b_state = b_s.to(dtype)
        b_u = b_v.to(tl.float32) - dot(b_kin, b_state, PRECISION=PRECISION)
        b_u = dot(b_a, b_u.to(dtype), PRECISION=PRECISION).to(dtype)
        if not STATE_ONLY:
            b_o = dot(b_qin, b_state, PRECISION=PRECISION)
            b_o = dot(b_p, b_u, b_o, PRECISION=PRECISION)
            tl.store(p_o + o_row[:, None] * V + o_v[None, :], b_o.to(dtype), mask=m_tv)
        b_s = dot(tl.trans(b_kout), b_u, b_s * b_decay[:, None], PRECISION=PRECISION)
    store_state(b_s, p_states, p_final, i_n, i_slot, i_h, o_k, o_v, is_last, HV, K, V, STATE_ONLY)


class Prepared(NamedTuple):
    """What `chunk_kda_prepare` and `chunk_kda_strong_decay` compute of a call's chunks."""

    a: Tensor  # [B, T, HV, 64]
    p: Tensor  # [B, T, HV, 64]
    n: Tensor  # [B, T, HV, 64] fp32, of all chunks if asked for, else of those that decay too much for one product
    qin: Tensor  # [B, T, HV, K]
    kin: Tensor  # [B, T, HV, K]
    kout: Tensor  # [B, T, HV, K]
    decay: Tensor  # [chunks, HV, K]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunks: Chunks,
    scale: float,
    qk_l2norm: bool,
    all_n: bool = False,
) -> Prepared:
    """Prepare all chunks of a call, in parallel."""
    B, T, HK, K = q.shape
    HV, BK = v.shape[2], padded(K)
    wide = tl.bfloat16 if v.dtype == torch.bfloat16 else tl.float32  # the factors exceed the range of fp16
    precision = input_precision(v.dtype)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=v.device)

    a, p = (empty(B, T, HV, CHUNK, dtype=v.dtype) for _ in range(2))
    n = empty(B, T, HV, CHUNK)
    qin, kin, kout = (empty(B, T, HV, K, dtype=v.dtype) for _ in range(3))
    decay = empty(chunks.programs, HV, K)
    ranges = empty(chunks.programs, HV)
    norms = empty(B, T, HV, 2) if qk_l2norm else None
    shape = dict(T=T, HV=HV, BT=CHUNK)
    with on_device(v):
        if B * T > 0:
            launch(
                prepare_kernel,
                (chunks.programs, HV),
                p_q=q,
                p_k=k,
                p_g=g,
                p_beta=beta,
                p_qin=qin,
                p_kin=kin,
                p_kout=kout,
                p_decay=decay,
                p_range=ranges,
                p_norms=norms,
                p_a=a,
                p_p=p,
                p_n=n if all_n else None,
                scale=scale,
                **strides(q=q, k=k, g=g, b=beta),
                HK=HK,
                K=K,
                BK=min(BK, PREPARE_CONFIG.BK),
                INSIDE=wide,
                OPERANDS=OPERANDS[v.dtype],
                WIDEST=WIDEST[v.dtype],
                PRECISION=precision,
                num_warps=PREPARE_CONFIG.num_warps,
                num_stages=PREPARE_CONFIG.num_stages,
                **chunks.arguments(),
                **shape,
            )
            launch(
                scores_kernel,
                (chunks.programs * (CHUNK // SCORES_CONFIG.BC), HV),
                p_q=q,
                p_k=k,
                p_g=g,
                p_range=ranges,
                p_norms=norms,
                p_n=n,
                p_p=p,
                scale=scale,
                **strides(q=q, k=k, g=g),
                HK=HK,
                K=K,
                BC=SCORES_CONFIG.BC,
                BK=min(BK, SCORES_CONFIG.BK),
                INSIDE=wide,
                WIDEST=WIDEST[v.dtype],
                PRECISION=precision,
                num_warps=SCORES_CONFIG.num_warps,
                **chunks.arguments(),
                **shape,
            )
            launch(
                inverse_kernel,
                (chunks.programs, HV),
                p_k=k,
                p_g=g,
                p_beta=beta,
                p_range=ranges,
                p_norms=norms,
                p_n=n,
                p_a=a,
                p_kout=kout,
                **strides(k=k, g=g, b=beta),
                HK=HK,
                K=K,
                BK=min(BK, INVERSE_CONFIG.BK),
                OPERANDS=OPERANDS[v.dtype],
                WIDEST=WIDEST[v.dtype],
                num_warps=INVERSE_CONFIG.num_warps,
                **chunks.arguments(),
                **shape,
            )
    return Prepared(a, p, n, qin, kin, kout, decay)


def chunk_kda(
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
    """Chunked gated delta rule, one decay per channel; the decay may be of any size.

    Args:
        q, k: ``[B, T, HK, K]`` in float16, bfloat16 or float32; K up to 256. In bfloat16, |k|^2 is limited to the range
            of float16, 65,504; with qk_l2norm it is at most 1.
        v: ``[B, T, HV, V]`` in the same dtype, HV a multiple of HK; V up to 256.
        g: ``[B, T, HV, K]`` fp32, natural-log decay, at most 0.
        beta: ``[B, T, HV]``.
        scale: factor on the output.
        initial_state: ``[N, HV, K, V]``; zeros when None.
        cu_seqlens: ``[N + 1]`` boundaries of N sequences packed along T (then B is 1), on the tensors' device.
        qk_l2norm: L2-normalise q and k over K first, x / sqrt(sum x^2 + 1e-6).
        slots: `initial_state` is a pool fp32 ``[P, HV, K, V]``, read and written in place.

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` in v's dtype and ``[N, HV, K, V]`` in fp32.
    """
    (B, T, HV, V), K = v.shape, q.shape[3]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    chunks = chunks_of(B, T, cu_seqlens)
    prepared = prepare(q, k, v, g, beta, chunks, scale, qk_l2norm)
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
    if slots is not None:
        final_state = check_slots(initial_state, torch.float32)
    else:
        final_state = torch.empty(N, HV, K, V, dtype=torch.float32, device=v.device)
    if N > 0:
        scan(
            _scan_kernel,
            inputs=dict(
                p_v=v,
                p_a=prepared.a,
                p_kin=prepared.kin,
                p_kout=prepared.kout,
                p_decay=prepared.decay,
                **strides(v=v),
            ),
            outputs=dict(p_p=prepared.p, p_qin=prepared.qin, p_o=o),
            v=v,
            initial_state=initial_state,
            final_state=final_state,
            chunks=chunks,
            slots=slots,
            key_tiles=3,
        )
    return o, final_state


register(Kernel("chunk_kda", "triton", chunk_kda, why_not_chunk, checked=True, slots=True))
