"""Everything before the delta rule, for whole sequences, in one kernel: the first kernel of a prefill.

    x <- silu(conv(conv_state | x)) for x = q, k, v ;  q, k <- x / sqrt(sum x^2 + 1e-6)
    g <- -exp(A_log) softplus(a + dt_bias), or lower_bound sigmoid(exp(A_log) (a + dt_bias)) ;  beta <- sigmoid(b)

The oracle is `hf_gdn.kernels.reference.prologue`. Inputs are views of the projections' outputs in the family's own
layout. Each activation is written once, in the layout that the chunk kernels read, without split, cat, transpose or
fp32 copies.

A program serves some tokens of a sequence and one head: q and k of a key head, or v, decay and beta of a value head.
Every tap of the convolution loads the tile again, shifted; all loads but the first hit the L1 cache. The new
convolution state is written to a separate tensor; the cache is updated after the rest of the call has run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import DeltaRuleInputs, LayerSpec, Projections, Slots, Weights, check_slots
from .chunks import CHUNK, chunks_of, locate_chunk
from .math import conv_silu_tile, l2norm_rows, log_decay, only_if, writing_strength
from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, next_power_of_2, on_device, strides, tl, triton, why_not


@dataclass(frozen=True, kw_only=True)
class PrologueConfig(LaunchConfig):
    """Launch parameters of the prologue, and of the gradients of its heads.

    Args:
        max_dim: maximum padded head dimension (the larger of K and V) for which this row is used.
        BT: tokens per tile.
    """

    max_dim: int
    BT: int


# 16 elements per thread; with 32, some targets spill. The kernel is memory-bound.
PROLOGUE_CONFIGS = (
    PrologueConfig(max_dim=16, BT=64, num_warps=2, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=32, BT=64, num_warps=4, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=64, BT=64, num_warps=8, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=128, BT=32, num_warps=8, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=256, BT=16, num_warps=8, measured_on=NOT_MEASURED),
)


def prologue_config(configs: tuple[PrologueConfig, ...], BK: int, BV: int) -> PrologueConfig:
    """The launch parameters for padded head dimensions BK and BV."""
    return next(config for config in configs if max(BK, BV) <= config.max_dim)


def in_words(weight: Tensor) -> bool:
    """Whether a channel's weights ``[C, WIDTH]`` are one number of 64 bits, which is one load instead of four."""
    return weight.shape[1] == 4 and weight.element_size() == 2 and weight.data_ptr() % 8 == 0


@triton.jit
def _last_inputs(p_x, stride_t, p_conv_state, p_recent, start, end, m_c, m_state, KEEP: tl.constexpr, BW: tl.constexpr):
    """Store the convolution state after the tokens from start to end. Pointers point to the channels, p_x to token 0;
    p_recent may be p_conv_state. m_state: channels that have a state before."""
    o_w = tl.arange(0, BW)
    o_from = end - KEEP + o_w[None, :]
    o_old = o_from - start + KEEP
    m = m_c[:, None] & (o_w < KEEP)[None, :]
    b_x = tl.load(p_x[:, None] + o_from * stride_t, mask=m & (o_from >= start), other=0.0)
    if p_conv_state is not None:
        m_old = m & m_state[:, None] & (o_from < start) & (o_old >= 0)
        b_x = tl.where(o_from < start, tl.load(p_conv_state[:, None] + o_old, mask=m_old, other=0.0), b_x)
        tl.debug_barrier()  # a column may be read by one thread and written by another
    tl.store(p_recent[:, None] + o_w[None, :], b_x, mask=m)


@triton.jit(do_not_specialize=["T"])
def _prologue_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_v,  # [B, T, HK, R, V]
    p_a,  # [B, T, HK, R], or [B, T, HK, R, K] with one decay per channel
    p_b,  # [B, T, HK, R]
    p_conv_state,  # [B, C, KEEP] contiguous, C = HK K + HK K + HV V; or None
    p_weight,  # [C, WIDTH] contiguous
    p_bias,  # [C] or None
    p_A_log,  # [HV]
    p_dt_bias,  # [HV] or [HV, K]
    p_lengths,  # [B], or None
    p_oq,  # [B, T, HK, K] contiguous, like all outputs
    p_ok,  # [B, T, HK, K]
    p_ov,  # [B, T, HV, V]
    p_og,  # [B, T, HV] or [B, T, HV, K]
    p_obeta,  # [B, T, HV]
    p_recent,  # [B, C, KEEP], or None
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    p_slots,  # [N] rows of p_conv_state, which p_recent then is, and whose rows are strided; or None
    p_begun,  # [N], whether these hold states; or None
    beta_scale,
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
    stride_vr,
    stride_ab,
    stride_at,
    stride_ah,
    stride_ar,
    stride_bb,
    stride_bt,
    stride_bh,
    stride_br,
    stride_conv,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP: tl.constexpr,
    BW: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    LOWER_BOUND: tl.constexpr,
    IS_KDA: tl.constexpr,
    DECAY_IN_DTYPE: tl.constexpr,
):
    # Adjacent programs serve heads of the same tokens, which are in the same rows of memory.
    i_h = tl.program_id(0) % (HK + HV)
    i_tile = (tl.program_id(0) // (HK + HV)).to(tl.int64)
    i_chunk, i_sub = i_tile // (CHUNK // BT), i_tile % (CHUNK // BT)
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    i_t += i_sub * BT
    if i_t >= end:
        return
    if p_bounds is not None:
        i_n = tl.load(p_sequence + i_chunk)
        start = tl.load(p_bounds + i_n).to(tl.int64)
        is_first = i_tile == 0
        p_context = None  # packed sequences do not read the convolution state
    else:
        start = i_b * 0
        is_first = i_t == 0
        p_context = p_conv_state
    length = i_b * 0 + T
    if p_lengths is not None:
        length = tl.load(p_lengths + i_b).to(tl.int64)
    # The tokens after which the convolution state is stored.
    first, after = i_b * 0, length
    i_channel = i_b * (2 * HK * K + HV * V)
    has_begun = None
    if p_slots is not None:  # but for those whose states are in slots
        is_first = i_t == start
        i_slot = tl.load(p_slots + i_n)
        p_conv_state += i_slot * stride_conv
        p_recent += i_slot * stride_conv
        p_context = p_conv_state
        has_begun = tl.load(p_begun + i_n) != 0
        first, after = start, end
    dtype = p_oq.dtype.element_ty
    o_t = i_t + tl.arange(0, BT)
    m_t = o_t < end
    o_row = i_b * T + o_t
    # Block sizes differ, so the branches must not share variable names (Triton would unify their types).
    if i_h < HK:
        o_k = tl.arange(0, BK)
        m_k = o_k < K
        m_ck = m_k if has_begun is None else only_if(m_k, has_begun)
        m_tk = m_t[:, None] & m_k[None, :]
        o_q = i_h * K + o_k
        o_key = HK * K + o_q
        p_xq = p_q + i_b * stride_qb + i_h * stride_qh + o_k
        p_xk = p_k + i_b * stride_kb + i_h * stride_kh + o_k
        b_q = conv_silu_tile(
            p_xq,
            stride_qt,
            None if p_context is None else p_context + (i_channel + o_q) * KEEP,
            p_weight + o_q * WIDTH,
            None if p_bias is None else p_bias + o_q,
            i_t,
            start,
            end,
            m_k,
            m_ck,
            BT,
            WIDTH,
            KEEP,
            WORDS,
        )
        o_out = (o_row * HK + i_h)[:, None] * K + o_k[None, :]
        tl.store(p_oq + o_out, l2norm_rows(b_q).to(dtype), mask=m_tk)
        b_k = conv_silu_tile(
            p_xk,
            stride_kt,
            None if p_context is None else p_context + (i_channel + o_key) * KEEP,
            p_weight + o_key * WIDTH,
            None if p_bias is None else p_bias + o_key,
            i_t,
            start,
            end,
            m_k,
            m_ck,
            BT,
            WIDTH,
            KEEP,
            WORDS,
        )
        tl.store(p_ok + o_out, l2norm_rows(b_k).to(dtype), mask=m_tk)
        if p_recent is not None and is_first:
            _last_inputs(
                p_xq,
                stride_qt,
                None if p_conv_state is None else p_conv_state + (i_channel + o_q) * KEEP,
                p_recent + (i_channel + o_q) * KEEP,
                first,
                after,
                m_k,
                m_ck,
                KEEP,
                BW,
            )
            _last_inputs(
                p_xk,
                stride_kt,
                None if p_conv_state is None else p_conv_state + (i_channel + o_key) * KEEP,
                p_recent + (i_channel + o_key) * KEEP,
                first,
                after,
                m_k,
                m_ck,
                KEEP,
                BW,
            )
    else:
        i_value = i_h - HK
        i_hk, i_r = i_value // (HV // HK), i_value % (HV // HK)
        o_v = tl.arange(0, BV)
        m_v = o_v < V
        m_cv = m_v if has_begun is None else only_if(m_v, has_begun)
        o_value = 2 * HK * K + i_value * V + o_v
        p_xv = p_v + i_b * stride_vb + i_hk * stride_vh + i_r * stride_vr + o_v
        b_v = conv_silu_tile(
            p_xv,
            stride_vt,
            None if p_context is None else p_context + (i_channel + o_value) * KEEP,
            p_weight + o_value * WIDTH,
            None if p_bias is None else p_bias + o_value,
            i_t,
            start,
            end,
            m_v,
            m_cv,
            BT,
            WIDTH,
            KEEP,
            WORDS,
        )
        o_head = o_row * HV + i_value
        tl.store(p_ov + o_head[:, None] * V + o_v[None, :], b_v.to(dtype), mask=m_t[:, None] & m_v[None, :])
        if p_recent is not None and is_first:
            _last_inputs(
                p_xv,
                stride_vt,
                None if p_conv_state is None else p_conv_state + (i_channel + o_value) * KEEP,
                p_recent + (i_channel + o_value) * KEEP,
                first,
                after,
                m_v,
                m_cv,
                KEEP,
                BW,
            )
        m_real = o_t < length
        p_xb = p_b + i_b * stride_bb + i_hk * stride_bh + i_r * stride_br
        b_beta = writing_strength(tl.load(p_xb + o_t * stride_bt, mask=m_t, other=0.0), beta_scale)
        tl.store(p_obeta + o_head, tl.where(m_real, b_beta, 0.0), mask=m_t)
        p_xa = p_a + i_b * stride_ab + i_hk * stride_ah + i_r * stride_ar + o_t * stride_at
        b_rate = tl.exp(tl.load(p_A_log + i_value).to(tl.float32))
        if IS_KDA:
            o_d = tl.arange(0, BK)
            m_d = o_d < K
            m_td = m_t[:, None] & m_d[None, :]
            b_bias = tl.load(p_dt_bias + i_value * K + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            b_a = tl.load(p_xa[:, None] + o_d[None, :], mask=m_td, other=0.0)
            b_g = log_decay(b_a, b_bias, b_rate, dtype, LOWER_BOUND, DECAY_IN_DTYPE)
            tl.store(p_og + o_head[:, None] * K + o_d[None, :], tl.where(m_real[:, None], b_g, 0.0), mask=m_td)
        else:
            b_a = tl.load(p_xa, mask=m_t, other=0.0)
            b_bias = tl.load(p_dt_bias + i_value).to(tl.float32)
            b_g = log_decay(b_a, b_bias, b_rate, dtype, LOWER_BOUND, DECAY_IN_DTYPE)
            tl.store(p_og + o_head, tl.where(m_real, b_g, 0.0), mask=m_t)


def prologue(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    *,
    conv_state: Tensor | None = None,
    keep: int = 0,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    slots: Slots | None = None,
) -> DeltaRuleInputs:
    """Everything before the delta rule, in one launch, without gradients. All arithmetic is fp32.

    Args:
        projected: outputs for tokens ``[B, T]``, T >= 1, in fp16, bf16 or fp32; a must be given. K and V up to 256.
        weights: in any float dtype, conv contiguous. Width of the convolution up to 8.
        spec: activation must be silu.
        conv_state: left context, the last inputs of the convolution: ``[B, C, keep]`` in the model's dtype; zeros when
            None. Packed sequences do not read it.
        keep: columns of the returned convolution state, which ends at each row's last token; 0 for none.
        cu_seqlens: ``[N + 1]`` boundaries of sequences packed along T, B = 1; the convolution stays inside each.
        lengths: ``[B]``, number of tokens in each row. Padding follows them; it gets zero log-decay and beta.
        slots: conv_state is a pool ``[P, C, keep]``, and packed sequences read and write their slots in place.

    Returns:
        q, k and v in the model's dtype, g and beta in fp32, and the convolution state, all new and contiguous.

    Source: Gated Delta Networks (arXiv 2412.06464), figure 1; Kimi Linear (arXiv 2510.26692), section 3.
    """
    q, k, v, a, b = projected[:5]
    assert a is not None
    B, T, HK, K = q.shape
    R, V = v.shape[3:]
    HV, C = HK * R, 2 * HK * K + HK * R * V
    is_kda = a.dim() == 3
    a = projected.decay_by_head()

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device=q.device)

    made = DeltaRuleInputs(
        q=empty(B, T, HK, K, dtype=q.dtype),
        k=empty(B, T, HK, K, dtype=q.dtype),
        v=empty(B, T, HV, V, dtype=q.dtype),
        g=empty(B, T, HV, K) if is_kda else empty(B, T, HV),
        beta=empty(B, T, HV),
        conv_state=empty(B, C, keep, dtype=q.dtype) if keep and slots is None else None,
    )
    if slots is not None:
        assert cu_seqlens is not None
        conv_state = check_slots(conv_state, q.dtype)
        made = made._replace(conv_state=conv_state)
    elif conv_state is not None:
        conv_state = conv_state.contiguous()
    chunks = chunks_of(B, T, cu_seqlens)
    BK, BV = next_power_of_2(K), next_power_of_2(V)
    config = prologue_config(PROLOGUE_CONFIGS, BK, BV)
    with on_device(q):
        launch(
            _prologue_kernel,
            (chunks.programs * (CHUNK // config.BT) * (HK + HV),),
            p_q=q,
            p_k=k,
            p_v=v,
            p_a=a,
            p_b=b,
            p_conv_state=conv_state,
            p_weight=weights.conv,
            p_bias=weights.conv_bias,
            p_A_log=weights.A_log,
            p_dt_bias=weights.dt_bias,
            p_lengths=lengths,
            p_oq=made.q,
            p_ok=made.k,
            p_ov=made.v,
            p_og=made.g,
            p_obeta=made.beta,
            p_recent=made.conv_state,
            p_slots=None if slots is None else slots.rows,
            p_begun=None if slots is None else slots.begun,
            beta_scale=spec.beta_scale,
            T=T,
            **strides(q=q, k=k),
            **strides("bthr", v=v, a=a, b=b),
            stride_conv=None if slots is None or conv_state is None else conv_state.stride(0),
            HK=HK,
            HV=HV,
            K=K,
            V=V,
            BT=config.BT,
            BK=BK,
            BV=BV,
            WIDTH=weights.conv.shape[1],
            KEEP=keep,
            BW=next_power_of_2(max(keep, 1)),
            WORDS=in_words(weights.conv),
            CHUNK=CHUNK,
            LOWER_BOUND=spec.lower_bound,
            IS_KDA=is_kda,
            DECAY_IN_DTYPE=spec.decay_in_dtype,
            num_warps=config.num_warps,
            **chunks.arguments(),
        )
    return made


register(Kernel("prologue_gdn", "triton", prologue, why_not, checked=True, slots=True))
register(Kernel("prologue_kda", "triton", prologue, why_not, checked=True, slots=True))
