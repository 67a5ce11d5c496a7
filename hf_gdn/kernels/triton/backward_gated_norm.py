"""The gradients of the gated output norm.

With n = o r, r = 1 / sqrt(mean o^2 + eps), and X' the gradient of X:

    n' = y' gate(z) w ;  o' = r (n' - n mean(n' n)) ;  z' = y' n w gate'(z) ;  w' = sum over rows of y' gate(z) n

The oracle is autograd through `hf_gdn.kernels.reference.gated_norm`. All is computed again from the inputs, in fp32,
without the forward's roundings. A program serves `steps` tiles of rows, and writes its sum for w'.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, NormGradients
from .math import gate_and_slope
from .partial_sums import sum_partials
from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, next_power_of_2, on_device, strides, tl, triton, why_not


@dataclass(frozen=True, kw_only=True)
class BackwardNormConfig(LaunchConfig):
    """Launch parameters of the gradients of the gated norm.

    Args:
        elements: elements per tile.
        steps: tiles per program.
    """

    elements: int
    steps: int


# 16 rows of 128 elements per tile, 16 elements per thread; 256 rows per program.
BACKWARD_NORM_CONFIG = BackwardNormConfig(elements=2048, steps=16, num_warps=4, measured_on=NOT_MEASURED)


@triton.jit(do_not_specialize=["rows", "T"])
def _gated_norm_gradients_kernel(
    p_o,  # [B, T, HV, V] contiguous
    p_z,  # [B, T, HK, R, V]
    p_w,  # [V]
    p_dy,  # [B, T, HV, V] contiguous
    p_do,  # [B, T, HV, V] contiguous
    p_dz,  # [B, T, HV, V] contiguous
    p_partials,  # [programs, V]
    eps,
    rows,  # B T HV
    T,
    stride_zb,
    stride_zt,
    stride_zh,
    stride_zr,
    HV: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    STEPS: tl.constexpr,
    GATE_IS_SILU: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    b_w = tl.load(p_w + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([BV], tl.float32)
    for i_step in range(STEPS):
        o_r = (i_p * STEPS + i_step) * BR + tl.arange(0, BR)
        m = (o_r < rows)[:, None] & m_v[None, :]
        o_h, o_t = o_r % HV, o_r // HV
        o_z = o_t // T * stride_zb + o_t % T * stride_zt + o_h // R * stride_zh + o_h % R * stride_zr
        o_rv = o_r[:, None] * V + o_v[None, :]
        b_o = tl.load(p_o + o_rv, mask=m, other=0.0).to(tl.float32)
        b_z = tl.load(p_z + o_z[:, None] + o_v[None, :], mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(p_dy + o_rv, mask=m, other=0.0).to(tl.float32)
        b_r = tl.rsqrt(tl.sum(b_o * b_o, 1) / V + eps)[:, None]
        b_n = b_o * b_r
        b_gate, b_slope = gate_and_slope(b_z, GATE_IS_SILU)
        b_dz = b_dy * b_n * b_w * b_slope
        tl.store(p_dz + o_rv, b_dz.to(p_dz.dtype.element_ty), mask=m)
        b_dn = b_dy * b_gate
        b_dw += tl.sum(b_dn * b_n, 0)
        b_dn *= b_w
        b_do = b_r * (b_dn - b_n * (tl.sum(b_dn * b_n, 1) / V)[:, None])
        tl.store(p_do + o_rv, b_do.to(p_do.dtype.element_ty), mask=m)
    tl.store(p_partials + i_p * V + o_v, b_dw, mask=m_v)


def backward_gated_norm(o: Tensor, z: Tensor, weight: Tensor, d_y: Tensor, spec: LayerSpec) -> NormGradients:
    """Gradients of the gated norm, in two launches; the second adds up partial sums for the weight.

    Args:
        o, z, weight, spec: as in `gated_norm`.
        d_y: ``[B, T, HV, V]`` in o's dtype. o and d_y are copied if they are not contiguous.

    Returns:
        Gradients of o, z and the weight.
    """
    o, d_y = o.contiguous(), d_y.contiguous()
    d_o, d_z = torch.empty_like(o), torch.empty(z.shape, dtype=z.dtype, device=z.device)
    rows, (HV, V) = o.shape[:3].numel(), o.shape[2:]
    BV, config = next_power_of_2(V), BACKWARD_NORM_CONFIG
    BR = config.elements // BV
    programs = cdiv(rows, BR * config.steps)
    partials = torch.empty(programs, V, dtype=torch.float32, device=o.device)
    if rows > 0:
        with on_device(o):
            launch(
                _gated_norm_gradients_kernel,
                (programs,),
                p_o=o,
                p_z=z,
                p_w=weight,
                p_dy=d_y,
                p_do=d_o,
                p_dz=d_z,
                p_partials=partials,
                eps=spec.eps,
                rows=rows,
                T=o.shape[1],
                **strides("bthr", z=z),
                HV=HV,
                R=z.shape[3],
                V=V,
                BR=BR,
                BV=BV,
                STEPS=config.steps,
                GATE_IS_SILU=spec.gate == "silu",
                num_warps=config.num_warps,
                num_stages=1,
            )
    return NormGradients(d_o, d_z, sum_partials(partials, weight.dtype))


register(Kernel("backward_gated_norm", "triton", backward_gated_norm, why_not, checked=True))
