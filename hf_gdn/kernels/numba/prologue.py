"""Everything before the delta rule, for whole sequences, in one compiled function: the first one of a prefill.

    x <- silu(conv(conv_state | x)) for x = q, k, v ;  q, k <- x / sqrt(sum x^2 + 1e-6)
    g <- -exp(A_log) softplus(a + dt_bias), or lower_bound sigmoid(exp(A_log) (a + dt_bias)) ;  beta <- sigmoid(b)

The oracle is `hf_gdn.kernels.reference.prologue`. Inputs are views of the projections' outputs in the family's own
layout. Each activation is written once, in the layout that the delta rules read. The new convolution state is written
to a separate tensor; the cache is updated after the rest of the call has run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import DeltaRuleInputs, LayerSpec, Projections, Slots, Weights, check_slots, state_dtype
from ..slots import write
from .arguments import BLOCK, CODES, LANES, PROLOGUE_BLOCK, padded
from .runtime import launch, why_not


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
    """Everything before the delta rule, without gradients. All arithmetic is fp32, or float64 for float64.

    Args:
        projected: outputs for tokens ``[B, T]`` in fp16, bf16, fp32 or float64; a must be given.
        weights: in any float dtype, contiguous.
        spec: activation must be silu.
        conv_state: left context, the last inputs of the convolution: ``[B, C, keep]`` in the model's dtype; zeros when
            None. Packed sequences do not read it.
        keep: columns of the returned convolution state, which ends at each row's last token; 0 for none.
        cu_seqlens: ``[N + 1]`` boundaries of sequences packed along T, B = 1; the convolution stays inside each.
        lengths: ``[B]``, number of tokens in each row. Padding follows them; it gets zero log-decay and beta.
        slots: conv_state is a pool ``[P, C, keep]``, and packed sequences read and write their slots.

    Returns:
        q, k and v in the model's dtype, g and beta in the arithmetic's dtype, and the convolution state, all new and
        contiguous.

    Source: Gated Delta Networks (arXiv 2412.06464), figure 1; Kimi Linear (arXiv 2510.26692), section 3.
    """
    q, k, v, a, b = projected[:5]
    assert a is not None
    B, T, HK, K = q.shape
    R, V = v.shape[3:]
    HV, width, dtype = HK * R, weights.conv.shape[1], state_dtype(q.dtype)
    is_kda = a.dim() == 3
    a = projected.decay_by_head()
    rows = B
    if slots is not None:
        # A sequence may begin in two tasks, so the pool is written when all are done.
        assert cu_seqlens is not None
        conv_state, rows = check_slots(conv_state, q.dtype), len(slots.rows)
    elif conv_state is not None:
        conv_state = conv_state.contiguous()
    made = DeltaRuleInputs(
        q=q.new_empty(B, T, HK, K),
        k=q.new_empty(B, T, HK, K),
        v=q.new_empty(B, T, HV, V),
        g=q.new_empty(B, T, HV, *([K] if is_kda else []), dtype=dtype),
        beta=q.new_empty(B, T, HV, dtype=dtype),
        conv_state=q.new_empty(rows, 2 * HK * K + HV * V, keep) if keep else None,
    )
    blocks = max(1, -(-T // PROLOGUE_BLOCK))
    KP, D = padded(K), padded(max(K, V))
    launch(
        "prologue",
        dtype,
        B * HK * blocks,
        B * T * (2 * HK * K + HV * V),
        D * (3 * width + BLOCK + PROLOGUE_BLOCK) + 2 * KP + 4 * LANES,
        (
            q, k, v, a, b, weights.conv, weights.conv_bias, weights.A_log, weights.dt_bias,
            conv_state,
            None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
            None if lengths is None else lengths.to(torch.int64).contiguous(),
            *made,
            *(slots or (None, None)),
        ),
        B, T, HK, R, K, V, width, keep, is_kda,
        CODES[q.dtype] if spec.decay_in_dtype else 0,
        spec.lower_bound is not None,
        blocks,
        spec.lower_bound or 0.0,
        spec.beta_scale,
    )  # fmt: skip
    if slots is None or conv_state is None or made.conv_state is None:
        return made
    write(conv_state, slots, made.conv_state, cu_seqlens)
    return made._replace(conv_state=conv_state)


register(Kernel("prologue_gdn", "numba", prologue, why_not, fast_on=("cpu",), slots=True))
register(Kernel("prologue_kda", "numba", prologue, why_not, fast_on=("cpu",), slots=True))
