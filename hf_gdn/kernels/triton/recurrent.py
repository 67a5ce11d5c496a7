"""The gated delta rule token by token: decoding, and short sequences such as a draft that is verified.

Per sequence and value head, with S of shape [K, V] and beta, g in fp32:

    S <- diag(exp g_t) S ;  u = beta_t (v_t - S^T k_t) ;  S <- S + k_t u^T ;  o_t = scale * S^T q_t

The oracle is `hf_gdn.kernels.reference.delta_rule`. g is one number per head (GDN) or per channel (KDA). A program
keeps some columns of S in registers over all tokens (`tokens`). The state is read once and written once, which
determines the cost of a decode step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import Slots, check_inplace, check_no_gradients, check_slots, check_token_states
from .math import l2norm, only_if
from .prepared import launch
from .runtime import cdiv, next_power_of_2, on_device, strides, tl, triton, why_not
from .tokens import FP_FUSION, delta_rule_token, tile_config


# T = 1 is compiled separately, without a loop; all other values of T share one kernel.
@triton.jit(do_not_specialize_on_alignment=["T"])
def _recurrent_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_v,  # [B, T, HV, V]
    p_g,  # [B, T, HV] or [B, T, HV, K]
    p_beta,  # [B, T, HV]
    p_initial,  # [N, HV, K, V] contiguous, or None for zeros; may equal p_final
    p_final,  # [N, HV, K, V] contiguous
    p_tokens,  # [B, T, HV, K, V], or None
    p_bounds,  # [N + 1] with B = 1, or None with N = B
    p_slots,  # [N] rows of p_initial and p_final, one pool whose rows are strided; or None for rows 0, 1, ...
    p_begun,  # [N], whether these hold states; or None
    p_o,  # [B, T, HV, V] contiguous
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
    stride_bb,
    stride_bt,
    stride_bh,
    stride_sb,
    stride_st,
    stride_sh,
    stride_pool,
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    IS_KDA: tl.constexpr,
    QK_L2NORM: tl.constexpr,
):
    # One grid axis, because y and z are limited to 65,535. Tiles of the same head are adjacent, so they share q and k.
    i_program = tl.program_id(0)
    i_v = i_program % tl.cdiv(V, BV)
    i_nh = (i_program // tl.cdiv(V, BV)).to(tl.int64)
    i_n, i_h = i_nh // HV, i_nh % HV
    i_hk = i_h // (HV // HK)
    if p_bounds is not None:
        i_b = i_n * 0
        i_t = tl.load(p_bounds + i_n).to(tl.int64)
        length = tl.load(p_bounds + i_n + 1).to(tl.int64) - i_t
    else:
        i_b = i_n
        i_t = i_n * 0
        length = T

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_s = m_k[:, None] & m_v[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]
    m_final = m_s
    if p_slots is not None:
        i_slot = tl.load(p_slots + i_n)
        p_final += i_slot * stride_pool + i_h * K * V
        b_s = tl.load(p_final + o_s, mask=only_if(m_s, tl.load(p_begun + i_n) != 0), other=0.0)
        m_final = only_if(m_s, length > 0)
    elif p_initial is not None:
        p_initial += i_nh * K * V
        b_s = tl.load(p_initial + o_s, mask=m_s, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros([BK, BV], tl.float32)

    p_q += i_b * stride_qb + i_t * stride_qt + i_hk * stride_qh + o_k
    p_k += i_b * stride_kb + i_t * stride_kt + i_hk * stride_kh + o_k
    p_v += i_b * stride_vb + i_t * stride_vt + i_h * stride_vh + o_v
    p_g += i_b * stride_gb + i_t * stride_gt + i_h * stride_gh
    p_beta += i_b * stride_bb + i_t * stride_bt + i_h * stride_bh
    p_o += ((i_b * T + i_t) * HV + i_h) * V + o_v
    if IS_KDA:
        p_g += o_k
    if p_tokens is not None:
        p_tokens += i_b * stride_sb + i_t * stride_st + i_h * stride_sh

    for _ in range(length):
        b_q = tl.load(p_q, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta).to(tl.float32)
        if QK_L2NORM:
            b_q, b_k = l2norm(b_q, BK), l2norm(b_k, BK)
        if IS_KDA:
            b_decay = tl.exp(tl.load(p_g, mask=m_k, other=0.0).to(tl.float32))[:, None]
        else:
            b_decay = tl.exp(tl.load(p_g).to(tl.float32))
        b_s, b_o = delta_rule_token(b_s, b_q, b_k, b_v, b_decay, b_beta, scale, BK, BV)
        tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_v)
        if p_tokens is not None:
            tl.store(p_tokens + o_s, b_s, mask=m_s)
            p_tokens += stride_st
        p_q += stride_qt
        p_k += stride_kt
        p_v += stride_vt
        p_g += stride_gt
        p_beta += stride_bt
        p_o += HV * V
    if p_slots is None:
        p_final += i_nh * K * V
    tl.store(p_final + o_s, b_s, mask=m_final)


def recurrent(
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
    inplace: bool = False,
    token_states: Tensor | None = None,
    slots: Slots | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated delta rule token by token, in one kernel, without gradients.

    Everything but `initial_state` may be strided in its outer dimensions. All arithmetic is fp32.

    Args:
        q, k: ``[B, T, HK, K]`` in fp16, bf16 or fp32, any T including 0; K and V up to 256.
        v: ``[B, T, HV, V]`` in q's dtype, HV a multiple of HK.
        g: natural-log decay, at most 0: fp32 ``[B, T, HV]`` (GDN) or ``[B, T, HV, K]`` (KDA).
        beta: ``[B, T, HV]`` in fp32 or q's dtype.
        scale: factor on the output.
        initial_state: fp32 ``[N, HV, K, V]``; zeros when None.
        cu_seqlens: int32 or int64 ``[N + 1]``, boundaries of N sequences packed along T; then B is 1, else N is B.
            The state of a sequence without tokens is unchanged.
        qk_l2norm: L2-normalise q and k over K first, x / sqrt(sum x^2 + 1e-6).
        inplace: write the final state to `initial_state` and return this tensor.
        token_states: fp32 ``[B, T, HV, K, V]``, each ``[K, V]`` contiguous; receives the state after every token.
        slots: `initial_state` is a pool fp32 ``[P, HV, K, V]``, read and written in place.

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` in v's dtype and fp32 ``[N, HV, K, V]``.

    Raises:
        ValueError: `inplace` is set and `initial_state` is None or not contiguous fp32, or the layout of `token_states`
            is wrong.

    Source: Gated Delta Networks (arXiv 2412.06464), equation 10; Kimi Linear (arXiv 2510.26692), equation 1.
    """
    check_no_gradients(inplace, token_states, q, k, v, g, beta, initial_state)
    B, T, HK, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if slots is not None:
        final_state = check_slots(initial_state, torch.float32)
    elif inplace:
        final_state = check_inplace(initial_state, torch.float32)
    else:
        final_state = torch.empty(N, HV, K, V, dtype=torch.float32, device=q.device)
        initial_state = None if initial_state is None else initial_state.contiguous()
    if token_states is None:
        stride_sb = stride_st = stride_sh = 0
    else:
        check_token_states(token_states, torch.float32)
        stride_sb, stride_st, stride_sh = token_states.stride()[:3]
    o = torch.empty(B, T, HV, V, dtype=v.dtype, device=q.device)
    BV, num_warps = tile_config(N * HV, K, V)
    with on_device(q):
        launch(
            _recurrent_kernel,
            (N * HV * cdiv(V, BV),),
            p_q=q,
            p_k=k,
            p_v=v,
            p_g=g,
            p_beta=beta,
            p_initial=initial_state,
            p_final=final_state,
            p_tokens=token_states,
            p_bounds=cu_seqlens,
            p_slots=None if slots is None else slots.rows,
            p_begun=None if slots is None else slots.begun,
            p_o=o,
            scale=float(scale),
            T=T,
            **strides(q=q, k=k, v=v, g=g, b=beta),
            stride_sb=stride_sb,
            stride_st=stride_st,
            stride_sh=stride_sh,
            stride_pool=None if slots is None else final_state.stride(0),
            HK=HK,
            HV=HV,
            K=K,
            V=V,
            BK=next_power_of_2(K),
            BV=BV,
            IS_KDA=g.dim() == 4,
            QK_L2NORM=qk_l2norm,
            num_warps=num_warps,
            enable_fp_fusion=FP_FUSION,
        )
    return o, final_state


register(Kernel("recurrent_gdn", "triton", recurrent, why_not, checked=True, slots=True))
register(Kernel("recurrent_kda", "triton", recurrent, why_not, checked=True, slots=True))
