"""The gradients of everything before the delta rule.

With s the convolution of x, y = silu(s), n = y r, r = 1 / sqrt(sum y^2 + 1e-6), and X' the gradient of X:

    y' = r (n' - n sum(n' n)) for q and k, given for v ;  s' = y' silu'(s)
    x'_t = sum over i of w_i s'_(t + WIDTH - 1 - i) ;  w'_i = sum over t of s'_t x_(t - WIDTH + 1 + i)

The oracle is autograd through `hf_gdn.kernels.reference.prologue`. All is computed again from the inputs, in four
launches: s', and partial sums of w' (a program serves some chunks of one head of q, k or v); the gates
(`gate_gradients`); the transposed convolution of s', which needs the tokens behind; and the sums of all partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, Projections, PrologueGradients, Weights
from .chunks import CHUNK, chunks_of, locate_chunk
from .gate_gradients import launch_gate_gradients
from .math import conv_tile
from .partial_sums import SUM_CONFIG, column_sums
from .prepared import launch
from .prologue import PrologueConfig, prologue_config
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, next_power_of_2, on_device, strides, tl, triton, why_not

CHUNKS = 4  # per program: of 256 tokens and a width of 4, partial sums take 1 / 32 of the bytes of s' in bf16


@dataclass(frozen=True, kw_only=True)
class TransposedConfig(LaunchConfig):
    """Launch parameters of the transposed convolution: BT tokens and BC channels per program."""

    BT: int
    BC: int


# 16 elements per thread, as in the forward. Memory-bound.
BACKWARD_PROLOGUE_CONFIGS = (
    PrologueConfig(max_dim=16, BT=64, num_warps=2, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=32, BT=64, num_warps=4, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=64, BT=32, num_warps=4, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=128, BT=16, num_warps=4, measured_on=NOT_MEASURED),
    PrologueConfig(max_dim=256, BT=16, num_warps=8, measured_on=NOT_MEASURED),
)
TRANSPOSED_CONFIG = TransposedConfig(BT=32, BC=128, num_warps=8, measured_on=NOT_MEASURED)


@triton.jit
def _locate(i_chunk, p_bounds, p_first, p_sequence, T):
    """``(batch, first token, start and end of the sequence)`` of a chunk."""
    i_b, i_t, end = locate_chunk(i_chunk, p_bounds, p_first, p_sequence, T)
    start = i_b * 0
    if p_bounds is not None:
        start = tl.load(p_bounds + tl.load(p_sequence + i_chunk)).to(tl.int64)
    return i_b, i_t, start, end


@triton.jit
def _convolution_gradients(
    p_x,
    stride_t,
    p_weight,
    p_bias,
    p_d,
    stride_d,
    p_ds,
    stride_ds,
    b_dw,
    i_t,
    start,
    end,
    m_c,
    BT: tl.constexpr,
    BW: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
):
    """Store s' of BT tokens, and add to w' ``[BW, channels]``, whose row WIDTH is the bias's. Pointers point to the
    channels, those of tokens to token 0."""
    o_i = tl.arange(0, BT)
    o_t = i_t + o_i
    m_t = o_t < end
    m = m_t[:, None] & m_c[None, :]
    b_s = conv_tile(p_x, stride_t, None, p_weight, p_bias, i_t, start, end, m_c, m_c, BT, WIDTH, 0, False)
    b_sigmoid = tl.sigmoid(b_s)
    b_y = b_s * b_sigmoid
    b_d = tl.load((p_d + i_t * stride_d)[None, :] + o_i[:, None] * stride_d, mask=m, other=0.0).to(tl.float32)
    if IS_NORMALISED:
        b_r = tl.rsqrt(tl.sum(b_y * b_y, 1) + 1e-6)[:, None]
        b_n = b_y * b_r
        b_d = b_r * (b_d - b_n * tl.sum(b_n * b_d, 1)[:, None])
    b_d *= b_sigmoid + b_y * (1.0 - b_sigmoid)
    tl.store((p_ds + i_t * stride_ds)[None, :] + o_i[:, None] * stride_ds, b_d.to(p_ds.dtype.element_ty), mask=m)
    o_w = tl.arange(0, BW)
    for i in tl.static_range(WIDTH):
        o_from = (o_i - (WIDTH - 1 - i)) * stride_t
        m_from = (m_t & (o_t - (WIDTH - 1 - i) >= start))[:, None] & m_c[None, :]
        b_x = tl.load((p_x + i_t * stride_t)[None, :] + o_from[:, None], mask=m_from, other=0.0).to(tl.float32)
        b_dw += tl.where((o_w == i)[:, None], tl.sum(b_d * b_x, 0)[None, :], 0.0)
    if p_bias is not None:
        b_dw += tl.where((o_w == WIDTH)[:, None], tl.sum(b_d, 0)[None, :], 0.0)
    return b_dw


@triton.jit(do_not_specialize=["T", "chunks"])
def _convolution_gradients_kernel(
    p_q,  # [B, T, HK, K]
    p_k,  # [B, T, HK, K]
    p_v,  # [B, T, HK, R, V]
    p_weight,  # [C, WIDTH] contiguous, C = HK K + HK K + HV V
    p_bias,  # [C] or None
    p_dq,  # [B, T, HK, K] contiguous, like all gradients
    p_dk,  # [B, T, HK, K]
    p_dv,  # [B, T, HV, V]
    p_ds,  # [B, T, C], the gradient of the convolution
    p_partials,  # [.., COLUMNS]: of the weight, transposed, and of the bias
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    T,
    chunks,
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
    HK: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDTH: tl.constexpr,
    BW: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Adjacent programs serve heads of the same tokens, which are in the same rows of memory.
    i_h = tl.program_id(0) % (2 * HK + HV)
    i_p = (tl.program_id(0) // (2 * HK + HV)).to(tl.int64)
    SUB: tl.constexpr = CHUNK // BT
    TAPS: tl.constexpr = WIDTH if p_bias is None else WIDTH + 1
    C: tl.constexpr = 2 * HK * K + HV * V
    first, last = i_p * CHUNKS * SUB, tl.minimum((i_p + 1) * CHUNKS, chunks) * SUB
    o_w = tl.arange(0, BW)
    p_partials += i_p * COLUMNS + o_w[:, None] * C
    # Block sizes differ, so the branches must not share variable names (Triton would unify their types).
    if i_h < 2 * HK:
        is_q = i_h < HK
        i_hk = i_h % HK
        o_k = tl.arange(0, BK)
        m_k = o_k < K
        o_key = i_h * K + o_k
        if is_q:
            p_xk, p_dxk = p_q, p_dq
        else:
            p_xk, p_dxk = p_k, p_dk
        stride_xb = tl.where(is_q, stride_qb, stride_kb)
        stride_xt = tl.where(is_q, stride_qt, stride_kt)
        stride_xh = tl.where(is_q, stride_qh, stride_kh)
        b_dwk = tl.zeros([BW, BK], tl.float32)
        for i_k in range(first, last):
            i_bk, i_tk, start_k, end_k = _locate(i_k // SUB, p_bounds, p_first, p_sequence, T)
            b_dwk = _convolution_gradients(
                p_xk + i_bk * stride_xb + i_hk * stride_xh + o_k,
                stride_xt,
                p_weight + o_key * WIDTH,
                None if p_bias is None else p_bias + o_key,
                p_dxk + (i_bk * T * HK + i_hk) * K + o_k,
                HK * K,
                p_ds + i_bk * T * C + o_key,
                C,
                b_dwk,
                i_tk + i_k % SUB * BT,
                start_k,
                end_k,
                m_k,
                BT,
                BW,
                WIDTH,
                True,
            )
        tl.store(p_partials + o_key[None, :], b_dwk, mask=(o_w < TAPS)[:, None] & m_k[None, :])
    else:
        i_value = i_h - 2 * HK
        i_hv, i_r = i_value // (HV // HK), i_value % (HV // HK)
        o_v = tl.arange(0, BV)
        m_v = o_v < V
        o_value = 2 * HK * K + i_value * V + o_v
        b_dwv = tl.zeros([BW, BV], tl.float32)
        for i_v in range(first, last):
            i_bv, i_tv, start_v, end_v = _locate(i_v // SUB, p_bounds, p_first, p_sequence, T)
            b_dwv = _convolution_gradients(
                p_v + i_bv * stride_vb + i_hv * stride_vh + i_r * stride_vr + o_v,
                stride_vt,
                p_weight + o_value * WIDTH,
                None if p_bias is None else p_bias + o_value,
                p_dv + (i_bv * T * HV + i_value) * V + o_v,
                HV * V,
                p_ds + i_bv * T * C + o_value,
                C,
                b_dwv,
                i_tv + i_v % SUB * BT,
                start_v,
                end_v,
                m_v,
                BT,
                BW,
                WIDTH,
                False,
            )
        tl.store(p_partials + o_value[None, :], b_dwv, mask=(o_w < TAPS)[:, None] & m_v[None, :])


@triton.jit(do_not_specialize=["T"])
def _transposed_convolution_kernel(
    p_ds,  # [B, T, C]
    p_weight,  # [C, WIDTH] contiguous
    p_dx,  # [B, T, C]
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_sequence,  # [chunks], or None
    T,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    i_tile = (tl.program_id(0) // BLOCKS).to(tl.int64)
    i_b, i_t, end = locate_chunk(i_tile // (CHUNK // BT), p_bounds, p_first, p_sequence, T)
    i_t += i_tile % (CHUNK // BT) * BT
    if i_t >= end:
        return
    o_c = tl.program_id(0) % BLOCKS * BC + tl.arange(0, BC)
    o_t = i_t + tl.arange(0, BT)
    m_c = o_c < C
    o_tc = (i_b * T + o_t)[:, None] * C + o_c[None, :]
    b_dx = tl.zeros([BT, BC], tl.float32)
    for i in tl.static_range(WIDTH):
        m = (o_t + i < end)[:, None] & m_c[None, :]
        b_w = tl.load(p_weight + o_c * WIDTH + (WIDTH - 1 - i), mask=m_c, other=0.0).to(tl.float32)
        b_dx += tl.load(p_ds + o_tc + i * C, mask=m, other=0.0).to(tl.float32) * b_w[None, :]
    tl.store(p_dx + o_tc, b_dx.to(p_dx.dtype.element_ty), mask=(o_t < end)[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["rows"])
def _weight_gradients_kernel(
    p_partials,  # [rows, columns]: the weight of the convolution, transposed, its bias, A_log, dt_bias
    p_conv,  # [C, WIDTH]
    p_conv_bias,  # [C] or None
    p_A_log,  # [HV]
    p_dt_bias,  # [GATES]
    rows,
    C: tl.constexpr,
    HV: tl.constexpr,
    GATES: tl.constexpr,
    WIDTH: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    TAPS: tl.constexpr = WIDTH if p_conv_bias is None else WIDTH + 1
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    columns = TAPS * C + HV + GATES
    b_sum = column_sums(p_partials, rows, columns, o_n, o_n < columns, BP, BN)
    o_conv = o_n % C * WIDTH + o_n // C
    tl.store(p_conv + o_conv, b_sum.to(p_conv.dtype.element_ty), mask=o_n < WIDTH * C)
    if p_conv_bias is not None:
        m = (o_n >= WIDTH * C) & (o_n < TAPS * C)
        tl.store(p_conv_bias + (o_n - WIDTH * C), b_sum.to(p_conv_bias.dtype.element_ty), mask=m)
    o_n -= TAPS * C
    tl.store(p_A_log + o_n, b_sum.to(p_A_log.dtype.element_ty), mask=(o_n >= 0) & (o_n < HV))
    o_n -= HV
    tl.store(p_dt_bias + o_n, b_sum.to(p_dt_bias.dtype.element_ty), mask=(o_n >= 0) & (o_n < GATES))


def backward_prologue(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    d_g: Tensor,
    d_beta: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
) -> PrologueGradients:
    """Gradients of everything before the delta rule, without a convolution state. All arithmetic is fp32.

    Args:
        projected, weights, spec, cu_seqlens, lengths: as in `prologue`; T may be 0.
        d_q, d_k, d_v, d_g, d_beta: gradients of its results, in their shapes and dtypes, contiguous.

    Returns:
        Gradients of the projections and of the weights, in their dtypes. The gradient of the convolution is rounded
        once on the way, to bf16 for bf16 models; fp16's range does not hold it, so it is fp32 there.
    """
    q, k, v, a, b = projected[:5]
    assert a is not None
    (B, T, HK, K), (HV, V) = q.shape, d_v.shape[2:]
    C, WIDTH = weights.conv.shape

    def empty_like(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=q.device)

    found = PrologueGradients(
        qkv=empty(B, T, C, dtype=q.dtype),
        a=empty_like(a),
        b=empty_like(b),
        conv=empty_like(weights.conv),
        A_log=empty_like(weights.A_log),
        dt_bias=empty_like(weights.dt_bias),
        conv_bias=None if weights.conv_bias is None else empty_like(weights.conv_bias),
    )
    chunks = chunks_of(B, T, cu_seqlens)
    BK, BV = next_power_of_2(K), next_power_of_2(V)
    config = prologue_config(BACKWARD_PROLOGUE_CONFIGS, BK, BV)
    taps, gates = WIDTH + (weights.conv_bias is not None), d_g.shape[2:].numel()
    parts, columns = cdiv(chunks.programs, CHUNKS), taps * C + HV + gates
    d_s = empty(B, T, C, dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32)
    partials = empty(parts, columns, dtype=torch.float32)
    with on_device(q):
        if B * T > 0:
            launch(
                _convolution_gradients_kernel,
                (parts * (2 * HK + HV),),
                p_q=q,
                p_k=k,
                p_v=v,
                p_weight=weights.conv,
                p_bias=weights.conv_bias,
                p_dq=d_q,
                p_dk=d_k,
                p_dv=d_v,
                p_ds=d_s,
                p_partials=partials,
                T=T,
                chunks=chunks.programs,
                **strides(q=q, k=k),
                **strides("bthr", v=v),
                HK=HK,
                HV=HV,
                K=K,
                V=V,
                BT=config.BT,
                BK=BK,
                BV=BV,
                WIDTH=WIDTH,
                BW=next_power_of_2(taps),
                CHUNK=CHUNK,
                CHUNKS=CHUNKS,
                COLUMNS=columns,
                num_warps=config.num_warps,
                num_stages=1,
                **chunks.arguments(),
            )
            launch_gate_gradients(
                projected, weights, spec, d_g, d_beta, lengths, chunks, CHUNKS, found, partials[:, taps * C :]
            )
            tiles = chunks.programs * (CHUNK // TRANSPOSED_CONFIG.BT)
            launch(
                _transposed_convolution_kernel,
                (tiles * cdiv(C, TRANSPOSED_CONFIG.BC),),
                p_ds=d_s,
                p_weight=weights.conv,
                p_dx=found.qkv,
                T=T,
                C=C,
                BT=TRANSPOSED_CONFIG.BT,
                BC=TRANSPOSED_CONFIG.BC,
                WIDTH=WIDTH,
                CHUNK=CHUNK,
                num_warps=TRANSPOSED_CONFIG.num_warps,
                **chunks.arguments(),
            )
        else:
            partials.zero_()
        launch(
            _weight_gradients_kernel,
            (cdiv(columns, SUM_CONFIG.BN),),
            p_partials=partials,
            p_conv=found.conv,
            p_conv_bias=found.conv_bias,
            p_A_log=found.A_log,
            p_dt_bias=found.dt_bias,
            rows=parts,
            C=C,
            HV=HV,
            GATES=gates,
            WIDTH=WIDTH,
            BP=SUM_CONFIG.BP,
            BN=SUM_CONFIG.BN,
            num_warps=SUM_CONFIG.num_warps,
        )
    return found


register(Kernel("backward_prologue_gdn", "triton", backward_prologue, why_not, checked=True))
register(Kernel("backward_prologue_kda", "triton", backward_prologue, why_not, checked=True))
