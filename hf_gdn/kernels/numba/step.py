"""Decoding in one compiled function: everything between a layer's projections, for the next few tokens of a cache.

    x <- silu(conv(conv_state | x)) for x = q, k, v ;  q, k <- x / sqrt(sum x^2 + 1e-6)
    g <- -exp(A_log) softplus(a + dt_bias), or lower_bound sigmoid(exp(A_log) (a + dt_bias)) ;  beta <- sigmoid(b)
    S <- diag(exp g) S ;  u = beta (v - S^T k) ;  S <- S + k u^T ;  o = K^-1/2 S^T q          (delta rule)
    y <- norm(o) gate(z) ;  conv_state <- the last tokens of (conv_state | x)

The oracle is `hf_gdn.kernels.reference.step`. Inputs are views of the projections' outputs in the family's own layout.
Both states are updated in place, each read once and written once. A task is a key head of a sequence and its value
heads: it alone reads and writes their part of both states, so tasks need no order.
"""

from __future__ import annotations

from torch import Tensor

from ...registry import Kernel, register
from ..contract import LayerSpec, Projections, Slots, Weights, check_slots, state_dtype
from .arguments import BLOCK, CODES, LANES, padded
from .runtime import launch, why_not


def step(
    projected: Projections,
    weights: Weights,
    spec: LayerSpec,
    conv_state: Tensor,
    state: Tensor,
    slots: Slots | None = None,
) -> Tensor:
    """Process the next few tokens of a layer, without gradients; conv_state and state are updated in place.

    All arithmetic is fp32, or float64 for float64.

    Args:
        projected: outputs for tokens ``[B, T]``, T >= 1, in fp16, bf16, fp32 or float64; a must be given.
        weights: in any float dtype, contiguous; norm must be given.
        spec: activation must be silu, gate silu or sigmoid.
        conv_state: ``[B, C, width]`` in the model's dtype, contiguous: the last inputs of the convolution, oldest
            first, over q | k | v, as transformers keeps them.
        state: ``[B, HV, K, V]``, contiguous, in the arithmetic's dtype.
        slots: both states are pools, ``[P, C, width]`` and ``[P, HV, K, V]``, read and written in place.

    Returns:
        ``[B, T, HV, V]`` in the model's dtype, normed and gated, for the output projection.

    Source: Gated Delta Networks (arXiv 2412.06464), figure 1; Kimi Linear (arXiv 2510.26692), section 3.
    """
    q, k, v, a, b, z = projected[:6]
    assert a is not None
    B, T, HK, K = q.shape
    R, V = v.shape[3:]
    HV, width = HK * R, weights.conv.shape[1]
    is_kda = a.dim() == 3
    a = projected.decay_by_head()
    if slots is not None:
        check_slots(conv_state, q.dtype)
        check_slots(state, state_dtype(q.dtype))
    y = v.new_empty(B, T, HV, V)
    KP, VP = padded(K), padded(V)
    shared = KP * LANES + max(KP, VP) * (width + 1) + BLOCK * VP + KP + 2 * VP + 5 * BLOCK * KP + BLOCK * VP + 3 * BLOCK
    convolution = (2 * width + 1 + BLOCK) * (2 * KP + R * VP) + R * (KP + LANES)
    launch(
        "step",
        state_dtype(q.dtype),
        B * HK,
        B * HV * K * V * T,
        shared + convolution + 2 * LANES,
        (
            q, k, v, a, b, z, weights.conv, weights.conv_bias, weights.A_log, weights.dt_bias, weights.norm,
            conv_state, state, y, *(slots or (None, None)),
        ),
        B, T, HK, R, K, V, width, conv_state.shape[2], is_kda,
        CODES[q.dtype] if spec.decay_in_dtype else 0,
        spec.lower_bound is not None,
        spec.norm_in_fp32,
        spec.gate == "silu",
        spec.lower_bound or 0.0,
        spec.beta_scale,
        spec.eps,
        K**-0.5,
    )  # fmt: skip
    return y


register(Kernel("step_gdn", "numba", step, why_not, fast_on=("cpu",), slots=True))
register(Kernel("step_kda", "numba", step, why_not, fast_on=("cpu",), slots=True))
