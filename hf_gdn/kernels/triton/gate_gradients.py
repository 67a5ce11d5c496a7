"""The gradients of a layer's gates: one of the launches of `backward_prologue`.

    x = a + dt_bias ;  b' = beta'(b) beta' ;  dt_bias' = sum of a'
    a' = -exp(A_log) sigmoid(x) g' ;  A_log' = sum of -exp(A_log) softplus(x) g'          without a lower bound
    a' = exp(A_log) lower_bound sigmoid'(exp(A_log) x) g' ;  A_log' = sum of a' x         with one

A program serves some chunks of all heads (one decay per head), or of one head (one decay per channel), and writes its
part of the two sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contract import LayerSpec, Projections, PrologueGradients, Weights
from .chunks import CHUNK, Chunks, locate_chunk
from .math import sigmoid_and_slope, softplus
from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, next_power_of_2, on_device, strides, tl, triton


@dataclass(frozen=True, kw_only=True)
class GatesConfig(LaunchConfig):
    """Launch parameters of the gates' gradients; `elements` is the number of elements per tile."""

    elements: int


GATES_CONFIG = GatesConfig(elements=2048, num_warps=4, measured_on=NOT_MEASURED)


@triton.jit(do_not_specialize=["T", "chunks"])
def _gate_gradients_kernel(
    p_a,  # [B, T, HK, R], or [B, T, HK, R, K] with one decay per channel
    p_b,  # [B, T, HK, R]
    p_A_log,  # [HV]
    p_dt_bias,  # [HV] or [HV, K]
    p_lengths,  # [B], or None
    p_dg,  # [B, T, HV] or [B, T, HV, K], contiguous, like all gradients
    p_dbeta,  # [B, T, HV]
    p_da,  # [B, T, HV] or [B, T, HV, K]
    p_db,  # [B, T, HV]
    p_partials,  # [.., columns]: HV of A_log, and those of dt_bias
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    beta_scale,
    T,
    chunks,
    stride_ab,
    stride_at,
    stride_ah,
    stride_ar,
    stride_bb,
    stride_bt,
    stride_bh,
    stride_br,
    HV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOWER_BOUND: tl.constexpr,
    IS_KDA: tl.constexpr,
):
    SUB: tl.constexpr = CHUNK // BT
    GATES: tl.constexpr = HV * K if IS_KDA else HV
    o_c = tl.arange(0, BC)
    if IS_KDA:
        i_p, i_h = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
        o_h = i_h + tl.arange(0, 1)
        o_dt, m_c, m_h = i_h * K + o_c, o_c < K, tl.arange(0, 1) < 1
        o_a = i_h // R * stride_ah + i_h % R * stride_ar + o_c
    else:
        i_p = tl.program_id(0).to(tl.int64)
        o_h = o_c
        o_dt, m_c, m_h = o_c, o_c < HV, o_c < HV
        o_a = o_c // R * stride_ah + o_c % R * stride_ar
    o_b = o_h // R * stride_bh + o_h % R * stride_br
    b_rate = tl.exp(tl.load(p_A_log + o_h, mask=m_h, other=0.0).to(tl.float32))[None, :]
    b_bias = tl.load(p_dt_bias + o_dt, mask=m_c, other=0.0).to(tl.float32)[None, :]
    b_dA = tl.zeros([BC], tl.float32)
    b_ddt = tl.zeros([BC], tl.float32)
    for i in range(i_p * CHUNKS * SUB, tl.minimum((i_p + 1) * CHUNKS, chunks) * SUB):
        i_b, i_t, end = locate_chunk(i // SUB, p_bounds, p_first, p_sequence, T)
        o_t = i_t + i % SUB * BT + tl.arange(0, BT)
        m_t = o_t < end
        m_real = m_t
        if p_lengths is not None:
            m_real = m_t & (o_t < tl.load(p_lengths + i_b).to(tl.int64))
        o_row = (i_b * T + o_t)[:, None]
        m_th = m_t[:, None] & m_h[None, :]
        b_b = tl.load(p_b + i_b * stride_bb + o_t[:, None] * stride_bt + o_b[None, :], mask=m_th, other=0.0)
        _, b_slope = sigmoid_and_slope(b_b.to(tl.float32))
        b_db = beta_scale * b_slope * tl.load(p_dbeta + o_row * HV + o_h[None, :], mask=m_th, other=0.0)
        b_db = tl.where(m_real[:, None], b_db, 0.0)
        tl.store(p_db + o_row * HV + o_h[None, :], b_db.to(p_db.dtype.element_ty), mask=m_th)

        m_tc = m_t[:, None] & m_c[None, :]
        b_x = tl.load(p_a + i_b * stride_ab + o_t[:, None] * stride_at + o_a[None, :], mask=m_tc, other=0.0)
        b_x = b_x.to(tl.float32) + b_bias
        b_dg = tl.load(p_dg + o_row * GATES + o_dt[None, :], mask=m_tc, other=0.0).to(tl.float32)
        if LOWER_BOUND is None:
            b_da = -b_rate * tl.sigmoid(b_x) * b_dg
            b_dr = -b_rate * softplus(b_x) * b_dg
        else:
            _, b_slope_a = sigmoid_and_slope(b_rate * b_x)
            b_da = LOWER_BOUND * b_rate * b_slope_a * b_dg
            b_dr = b_da * b_x
        m_sum = m_real[:, None] & m_c[None, :]
        b_da = tl.where(m_sum, b_da, 0.0)
        tl.store(p_da + o_row * GATES + o_dt[None, :], b_da.to(p_da.dtype.element_ty), mask=m_tc)
        b_ddt += tl.sum(b_da, 0)
        b_dA += tl.sum(tl.where(m_sum, b_dr, 0.0), 0)
    p_partials += i_p * COLUMNS
    if IS_KDA:
        tl.store(p_partials + o_h, tl.sum(b_dA, 0)[None], mask=m_h)
    else:
        tl.store(p_partials + o_h, b_dA, mask=m_h)
    tl.store(p_partials + HV + o_dt, b_ddt, mask=m_c)


def launch_gate_gradients(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    d_g: Tensor,
    d_beta: Tensor,
    lengths: Tensor | None,
    chunks: Chunks,
    per_program: int,
    found: PrologueGradients,
    partials: Tensor,
) -> None:
    """Write the gradients of a and b, and partial sums of those of A_log and dt_bias.

    Args:
        projected, weights, spec, d_g, d_beta, lengths: as in `backward_prologue`.
        chunks, per_program: the call's chunks, and how many a program serves.
        found: a and b are written.
        partials: ``[programs, HV + gates]`` in fp32, strided in its rows, as many gates as d_g has per token.
    """
    HK, (HV, *per_channel) = projected.q.shape[2], d_g.shape[2:]
    width = next_power_of_2(per_channel[0] if per_channel else HV)
    with on_device(d_g):
        launch(
            _gate_gradients_kernel,
            (len(partials) * (HV if per_channel else 1),),
            p_a=projected.decay_by_head(),
            p_b=projected.b,
            p_A_log=weights.A_log,
            p_dt_bias=weights.dt_bias,
            p_lengths=lengths,
            p_dg=d_g,
            p_dbeta=d_beta,
            p_da=found.a,
            p_db=found.b,
            p_partials=partials,
            beta_scale=spec.beta_scale,
            T=projected.q.shape[1],
            chunks=chunks.programs,
            **strides("bthr", a=projected.decay_by_head(), b=projected.b),
            HV=HV,
            R=HV // HK,
            K=projected.q.shape[3],
            BT=max(1, min(CHUNK, GATES_CONFIG.elements // width)),
            BC=width,
            CHUNK=CHUNK,
            CHUNKS=per_program,
            COLUMNS=partials.stride(0),
            LOWER_BOUND=spec.lower_bound,
            IS_KDA=bool(per_channel),
            num_warps=GATES_CONFIG.num_warps,
            num_stages=1,
            **chunks.arguments(),
        )
