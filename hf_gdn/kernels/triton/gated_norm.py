"""The gated output norm of a layer, for whole sequences: the last kernel of a prefill.

    y = norm(o) gate(z) ,  norm(o) = o / sqrt(mean o^2 + eps) * weight

The oracle is `hf_gdn.kernels.reference.gated_norm`. z is a view of the projection's output, in the family's layout.
If the weight is applied in the model's dtype (Qwen3-Next), the norm is rounded before and after it; otherwise it stays
in fp32 (Kimi-Linear).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec
from .math import norm_and_gate
from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, next_power_of_2, on_device, strides, tl, triton, why_not


@dataclass(frozen=True, kw_only=True)
class GatedNormConfig(LaunchConfig):
    """Launch parameters of the gated norm; `elements` is the number of elements per program."""

    elements: int


# 32 rows of 128 elements per program, 32 elements per thread. The kernel is memory-bound.
GATED_NORM_CONFIG = GatedNormConfig(elements=4096, num_warps=4, measured_on=NOT_MEASURED)


@triton.jit(do_not_specialize=["rows", "T"])
def _gated_norm_kernel(
    p_o,  # [B, T, HV, V] contiguous
    p_z,  # [B, T, HK, R, V]
    p_w,  # [V]
    p_y,  # [B, T, HV, V] contiguous
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
    NORM_IN_FP32: tl.constexpr,
    GATE_IS_SILU: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m = (o_r < rows)[:, None] & (o_v < V)[None, :]
    o_h, o_t = o_r % HV, o_r // HV
    o_z = o_t // T * stride_zb + o_t % T * stride_zt + o_h // R * stride_zh + o_h % R * stride_zr
    b_o = tl.load(p_o + o_r[:, None] * V + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + o_z[:, None] + o_v[None, :], mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(p_w + o_v, mask=o_v < V, other=0.0).to(tl.float32)[None, :]
    b_mean = tl.sum(b_o * b_o, 1)[:, None] / V
    b_y = norm_and_gate(b_o, b_mean, b_w, b_z, eps, p_y.dtype.element_ty, NORM_IN_FP32, GATE_IS_SILU)
    tl.store(p_y + o_r[:, None] * V + o_v[None, :], b_y.to(p_y.dtype.element_ty), mask=m)


def gated_norm(o: Tensor, z: Tensor, weight: Tensor, spec: LayerSpec) -> Tensor:
    """RMS norm of o, gated by z, without gradients. All arithmetic is fp32, except where the model rounds.

    Args:
        o: ``[B, T, HV, V]`` in fp16, bf16 or fp32; V up to 256. Copied if it is not contiguous.
        z: ``[B, T, HK, R, V]`` in o's dtype, R = HV / HK, contiguous in V.
        weight: ``[V]`` in any float dtype.
        spec: gate must be silu or sigmoid.

    Returns:
        ``[B, T, HV, V]`` in o's dtype, contiguous.
    """
    o = o.contiguous()
    y = torch.empty_like(o)
    rows, (HV, V) = o.shape[:3].numel(), o.shape[2:]
    BV = next_power_of_2(V)
    BR = GATED_NORM_CONFIG.elements // BV
    if rows == 0:
        return y
    with on_device(o):
        launch(
            _gated_norm_kernel,
            (cdiv(rows, BR),),
            p_o=o,
            p_z=z,
            p_w=weight,
            p_y=y,
            eps=spec.eps,
            rows=rows,
            T=o.shape[1],
            **strides("bthr", z=z),
            HV=HV,
            R=z.shape[3],
            V=V,
            BR=BR,
            BV=BV,
            NORM_IN_FP32=spec.norm_in_fp32,
            GATE_IS_SILU=spec.gate == "silu",
            num_warps=GATED_NORM_CONFIG.num_warps,
        )
    return y


register(Kernel("gated_norm", "triton", gated_norm, why_not, checked=True))
