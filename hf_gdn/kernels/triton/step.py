"""Decoding in two kernels: everything between a layer's projections, for the next few tokens of a cache.

    x <- silu(conv(conv_state | x)) for x = q, k, v ;  q, k <- x / sqrt(sum x^2 + 1e-6)
    g <- -exp(A_log) softplus(a + dt_bias), or lower_bound sigmoid(exp(A_log) (a + dt_bias)) ;  beta <- sigmoid(b)
    S <- diag(exp g) S ;  u = beta (v - S^T k) ;  S <- S + k u^T ;  o = K^-1/2 S^T q          (delta rule)
    y <- norm(o) gate(z) ;  conv_state <- the last tokens of (conv_state | x)

The oracle is `hf_gdn.kernels.reference.step`. Inputs are views of the projections' outputs in the family's own layout,
without split, concatenation, cast or copy. Both states are updated in place.

There are two kernels for two reasons. First, the programs of all value heads of a key head, and of all tiles of V, read
the key head's convolution state, so none of them may shift it while another may still read it. Second, the norm needs a
head's whole row of o, which is divided among tiles of V. The first kernel only reads the convolution state and stores o
before the norm; the second one applies the norm and shifts the convolution state. This costs one small launch, but
needs no atomics, counters or memory that outlives the call.

The delta rule is that of `tokens`: bits do not depend on the batch, the tile or how tokens are divided among calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, Projections, Slots, Weights, check_slots
from .math import conv_silu_token, l2norm, log_decay, norm_and_gate, only_if, sum_rows, writing_strength
from .prepared import Launcher, layout_of, prepare
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, next_power_of_2, on_device, strides, tl, triton, why_not
from .tokens import FP_FUSION, delta_rule_token, tile_config

# The second kernel: a program processes one row of V elements at a time, or the convolution state of a head.
FINISH_CONFIG = LaunchConfig(num_warps=1, measured_on=NOT_MEASURED)


# T = 1 is compiled separately, without a loop; all other values of T share one kernel.
@triton.jit(do_not_specialize_on_alignment=["T"])
def _step_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_v,  # [B, T, HK, R, V]
    p_a,  # [B, T, HK, R], or [B, T, HV, K] with one decay per channel
    p_b,  # [B, T, HK, R]
    p_conv_state,  # [B, C, WIDTH] contiguous, C = HK K + HK K + HV V
    p_weight,  # [C, WIDTH] contiguous
    p_bias,  # [C] or None
    p_A_log,  # [HV]
    p_dt_bias,  # [HV] or [HV, K]
    p_state,  # [B, HV, K, V] contiguous
    p_slots,  # [B] rows of p_conv_state and p_state, whose rows are then strided; or None for rows 0, 1, ...
    p_begun,  # [B], whether these hold states; or None
    p_o,  # [B, T, HV, V] contiguous
    scale,
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
    stride_state,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDTH: tl.constexpr,
    LOWER_BOUND: tl.constexpr,
    IS_KDA: tl.constexpr,
    DECAY_IN_DTYPE: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_v = i_program % tl.cdiv(V, BV)
    i_nh = (i_program // tl.cdiv(V, BV)).to(tl.int64)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hk, i_r = i_h // (HV // HK), i_h % (HV // HK)

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    m_ck, m_cv = m_k, m_v  # channels that have a convolution state
    if p_slots is not None:
        i_slot = tl.load(p_slots + i_n)
        has_begun = tl.load(p_begun + i_n) != 0
        p_s = p_state + i_slot * stride_state + i_h * K * V + o_k[:, None] * V + o_v[None, :]
        b_s = tl.load(p_s, mask=only_if(m_s, has_begun), other=0.0)
        p_conv_state += i_slot * stride_conv
        m_ck, m_cv = only_if(m_k, has_begun), only_if(m_v, has_begun)
    else:
        p_s = p_state + i_nh * K * V + o_k[:, None] * V + o_v[None, :]
        b_s = tl.load(p_s, mask=m_s, other=0.0)
        p_conv_state += i_n * (2 * HK * K + HV * V) * WIDTH

    o_ck = i_hk * K + o_k  # channels of q; channels of k follow, then those of v
    o_cv = 2 * HK * K + i_h * V + o_v
    p_q += i_n * stride_qb + i_hk * stride_qh + o_k
    p_k += i_n * stride_kb + i_hk * stride_kh + o_k
    p_v += i_n * stride_vb + i_hk * stride_vh + i_r * stride_vr + o_v
    p_a += i_n * stride_ab + i_hk * stride_ah + i_r * stride_ar
    p_b += i_n * stride_bb + i_hk * stride_bh + i_r * stride_br
    p_o += (i_n * T * HV + i_h) * V + o_v
    b_rate = tl.exp(tl.load(p_A_log + i_h).to(tl.float32))
    if IS_KDA:
        p_a += o_k
        b_bias = tl.load(p_dt_bias + i_h * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    else:
        b_bias = tl.load(p_dt_bias + i_h).to(tl.float32)

    for i_t in range(T):
        b_q = conv_silu_token(
            p_q,
            stride_qt,
            p_conv_state + o_ck * WIDTH,
            p_weight + o_ck * WIDTH,
            None if p_bias is None else p_bias + o_ck,
            m_k,
            m_ck,
            i_t,
            WIDTH,
        )
        b_k = conv_silu_token(
            p_k,
            stride_kt,
            p_conv_state + (HK * K + o_ck) * WIDTH,
            p_weight + (HK * K + o_ck) * WIDTH,
            None if p_bias is None else p_bias + HK * K + o_ck,
            m_k,
            m_ck,
            i_t,
            WIDTH,
        )
        b_v = conv_silu_token(
            p_v,
            stride_vt,
            p_conv_state + o_cv * WIDTH,
            p_weight + o_cv * WIDTH,
            None if p_bias is None else p_bias + o_cv,
            m_v,
            m_cv,
            i_t,
            WIDTH,
        )
        b_a = tl.load(p_a + i_t * stride_at, mask=m_k, other=0.0) if IS_KDA else tl.load(p_a + i_t * stride_at)
        b_g = log_decay(b_a, b_bias, b_rate, p_q.dtype.element_ty, LOWER_BOUND, DECAY_IN_DTYPE)
        b_beta = writing_strength(tl.load(p_b + i_t * stride_bt), beta_scale)
        b_decay = tl.exp(b_g)[:, None] if IS_KDA else tl.exp(b_g)
        b_s, b_o = delta_rule_token(b_s, l2norm(b_q, BK), l2norm(b_k, BK), b_v, b_decay, b_beta, scale, BK, BV)
        tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_v)
        p_o += HV * V
    tl.store(p_s, b_s, mask=m_s)


@triton.jit
def _shift_conv_state(p_x, stride_t, p_conv_state, m_c, m_state, T, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Shift the convolution state ``[channels, WIDTH]`` by T tokens, in place. Pointers point to the channels.
    m_state: channels that have a state; it is zero for others."""
    o_w = tl.arange(0, BW)[None, :]
    m = m_c[:, None] & (o_w < WIDTH)
    o_from = o_w + T  # in (conv_state | x)
    b_old = tl.load(p_conv_state[:, None] + o_from, mask=m & m_state[:, None] & (o_from < WIDTH), other=0.0)
    b_new = tl.load(p_x[:, None] + (o_from - WIDTH) * stride_t, mask=m & (o_from >= WIDTH), other=0.0)
    tl.debug_barrier()  # a column may be read by one thread and written by another
    tl.store(p_conv_state[:, None] + o_w, tl.where(o_from < WIDTH, b_old, b_new), mask=m)


@triton.jit(do_not_specialize_on_alignment=["T"])
def _finish_kernel(
    p_q,
    p_k,
    p_v,  # as in _step_kernel
    p_z,  # [B, T, HK, R, V]
    p_conv_state,  # [B, C, WIDTH] contiguous
    p_norm,  # [V]
    p_slots,  # as in _step_kernel
    p_begun,
    p_o,  # [B, T, HV, V] contiguous, normed in place
    eps,
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
    stride_zb,
    stride_zt,
    stride_zh,
    stride_zr,
    stride_conv,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDTH: tl.constexpr,
    BW: tl.constexpr,
    NORM_IN_FP32: tl.constexpr,
    GATE_IS_SILU: tl.constexpr,
):
    # Per sequence, one program for each value head (its rows, and its part of the convolution state), then one for each
    # key head (the parts of q and k).
    i_n = (tl.program_id(0) // (HV + HK)).to(tl.int64)
    i_h = tl.program_id(0) % (HV + HK)
    if p_slots is not None:
        p_conv_state += tl.load(p_slots + i_n) * stride_conv
        has_begun = tl.load(p_begun + i_n) != 0
    else:
        p_conv_state += i_n * (2 * HK * K + HV * V) * WIDTH
        has_begun = None
    # Block sizes differ, so the branches must not share variable names (Triton would unify their types).
    if i_h >= HV:
        i_key = i_h - HV
        o_k = tl.arange(0, BK)
        m_k = o_k < K
        m_ck = m_k if has_begun is None else only_if(m_k, has_begun)
        o_ck = i_key * K + o_k
        p_new_q = p_q + i_n * stride_qb + i_key * stride_qh + o_k
        _shift_conv_state(p_new_q, stride_qt, p_conv_state + o_ck * WIDTH, m_k, m_ck, T, WIDTH, BW)
        p_new_k = p_k + i_n * stride_kb + i_key * stride_kh + o_k
        _shift_conv_state(p_new_k, stride_kt, p_conv_state + (HK * K + o_ck) * WIDTH, m_k, m_ck, T, WIDTH, BW)
    else:
        i_hk, i_r = i_h // (HV // HK), i_h % (HV // HK)
        o_v = tl.arange(0, BV)
        m_v = o_v < V
        m_cv = m_v if has_begun is None else only_if(m_v, has_begun)
        o_cv = 2 * HK * K + i_h * V + o_v
        p_new_v = p_v + i_n * stride_vb + i_hk * stride_vh + i_r * stride_vr + o_v
        _shift_conv_state(p_new_v, stride_vt, p_conv_state + o_cv * WIDTH, m_v, m_cv, T, WIDTH, BW)
        p_row = p_o + (i_n * T * HV + i_h) * V + o_v
        p_gate = p_z + i_n * stride_zb + i_hk * stride_zh + i_r * stride_zr + o_v
        b_w = tl.load(p_norm + o_v, mask=m_v, other=0.0).to(tl.float32)
        for _ in range(T):
            b_o = tl.load(p_row, mask=m_v, other=0.0).to(tl.float32)
            b_z = tl.load(p_gate, mask=m_v, other=0.0).to(tl.float32)
            b_mean = sum_rows(b_o * b_o, BV, 1) / V
            b_y = norm_and_gate(b_o, b_mean, b_w, b_z, eps, p_o.dtype.element_ty, NORM_IN_FP32, GATE_IS_SILU)
            tl.store(p_row, b_y.to(p_o.dtype.element_ty), mask=m_v)
            p_row += HV * V
            p_gate += stride_zt


def step(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    conv_state: Tensor,
    state: Tensor,
    slots: Slots | None = None,
) -> Tensor:
    """Process the next few tokens of a layer, without gradients; conv_state and state are updated in place.

    All arithmetic is fp32.

    Args:
        projected: outputs for tokens ``[B, T]``, T >= 1, in fp16, bf16 or fp32; a must be given.
        weights: in any float dtype, conv contiguous; norm must be given. Width of the convolution up to 8.
        spec: activation must be silu, gate silu or sigmoid.
        conv_state: ``[B, C, width]`` in the model's dtype, contiguous: the last inputs of the convolution, oldest
            first, over q | k | v, as transformers keeps them.
        state: fp32 ``[B, HV, K, V]``, contiguous.
        slots: both states are pools, ``[P, C, width]`` and ``[P, HV, K, V]``, read and written in place.

    Returns:
        ``[B, T, HV, V]`` in the model's dtype, normed and gated, for the output projection.

    Source: Gated Delta Networks (arXiv 2412.06464), figure 1; Kimi Linear (arXiv 2510.26692), section 3.
    """
    q, k, v, a, b, z = projected[:6]
    if slots is not None:
        check_slots(conv_state, q.dtype)
        check_slots(state, torch.float32)
    places = slots or (None, None)
    tensors = (q, k, v, a, b, z, *weights, conv_state, state, *places)
    B, T = q.shape[:2]
    o = q.new_empty(B, T, state.shape[1], state.shape[3])
    with on_device(q):
        key = (*layout_of(tensors), B, T == 1, q.shape[2:], spec, q.device.index)
        launchers = _launchers.get(key)
        if launchers is None:
            launchers = _launchers[key] = _prepare(projected, weights, spec, conv_state, state, o, slots)
        rule, finish = launchers
        rule(q, k, v, a, b, conv_state, *weights[:4], state, *places, o, T)
        finish(q, k, v, z, conv_state, weights.norm, *places, o, T)
    return o


# By everything that the two kernels are compiled for.
_launchers: dict[tuple[Any, ...], tuple[Launcher, Launcher]] = {}


def _prepare(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    conv_state: Tensor,
    state: Tensor,
    o: Tensor,
    slots: Slots | None,
) -> tuple[Launcher, Launcher]:
    """The two launches of a step, both compiled before the first one changes a state."""
    q, k, v, a, b, z = projected[:6]
    assert a is not None
    B, T, HK, K = q.shape
    R, V = v.shape[3:]
    HV, is_kda = HK * R, a.dim() == 3
    BV, num_warps = tile_config(B * HV, K, V)
    places = dict(p_slots=None, p_begun=None) if slots is None else dict(p_slots=slots.rows, p_begun=slots.begun)
    sizes = dict(HK=HK, HV=HV, K=K, V=V, BK=next_power_of_2(K), WIDTH=weights.conv.shape[1])
    rule = dict(
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
        p_state=state,
        **places,
        p_o=o,
        scale=K**-0.5,
        beta_scale=spec.beta_scale,
        T=T,
        **strides(q=q, k=k),
        **strides("bthr", v=v, a=projected.decay_by_head(), b=b),
        stride_conv=None if slots is None else conv_state.stride(0),
        stride_state=None if slots is None else state.stride(0),
        **sizes,
        BV=BV,
        LOWER_BOUND=spec.lower_bound,
        IS_KDA=is_kda,
        DECAY_IN_DTYPE=spec.decay_in_dtype,
    )
    finish = dict(
        p_q=q,
        p_k=k,
        p_v=v,
        p_z=z,
        p_conv_state=conv_state,
        p_norm=weights.norm,
        **places,
        p_o=o,
        eps=spec.eps,
        T=T,
        **strides(q=q, k=k),
        **strides("bthr", v=v, z=z),
        stride_conv=None if slots is None else conv_state.stride(0),
        **sizes,
        BV=next_power_of_2(V),
        BW=next_power_of_2(sizes["WIDTH"]),
        NORM_IN_FP32=spec.norm_in_fp32,
        GATE_IS_SILU=spec.gate == "silu",
    )
    names = ("p_q", "p_k", "p_v", "p_a", "p_b", "p_conv_state", "p_weight", "p_bias", "p_A_log", "p_dt_bias")
    programs = B * HV * cdiv(V, BV)
    return (
        prepare(
            _step_kernel,
            programs,
            (*names, "p_state", "p_slots", "p_begun", "p_o", "T"),
            rule,
            num_warps=num_warps,
            enable_fp_fusion=FP_FUSION,
        ),
        prepare(
            _finish_kernel,
            B * (HV + HK),
            ("p_q", "p_k", "p_v", "p_z", "p_conv_state", "p_norm", "p_slots", "p_begun", "p_o", "T"),
            finish,
            num_warps=FINISH_CONFIG.num_warps,
            enable_fp_fusion=FP_FUSION,
        ),
    )


register(Kernel("step_gdn", "triton", step, why_not, checked=True, slots=True))
register(Kernel("step_kda", "triton", step, why_not, checked=True, slots=True))
