"""The gated delta rule token by token: decoding, prompts, and drafts that are verified.

Per sequence and value head, with S of shape [K, V]:

    S <- diag(exp g_t) S ;  u = beta_t (v_t - S^T k_t) ;  S <- S + k_t u^T ;  o_t = scale * S^T q_t

The oracle is `hf_gdn.kernels.reference.delta_rule`. g is one number per head (GDN) or per channel (KDA). A task is a
value head of a sequence; `compiled.tokens` has the order of the arithmetic, which is the same for any number of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import Kernel, register
from ..contract import Slots, check_inplace, check_no_gradients, check_slots, check_token_states, state_dtype
from .arguments import BLOCK, LANES, padded
from .runtime import launch, why_not


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
    """Gated delta rule token by token, in one compiled function, without gradients.

    Everything but `initial_state` may be strided in its outer dimensions. All arithmetic is fp32, or float64 for
    float64.

    Args:
        q, k: ``[B, T, HK, K]`` in fp16, bf16, fp32 or float64, any T including 0.
        v: ``[B, T, HV, V]`` in q's dtype, HV a multiple of HK.
        g: natural-log decay, at most 0: ``[B, T, HV]`` (GDN) or ``[B, T, HV, K]`` (KDA), in any float dtype.
        beta: ``[B, T, HV]`` in any float dtype.
        scale: factor on the output.
        initial_state: ``[N, HV, K, V]`` in the arithmetic's dtype; zeros when None.
        cu_seqlens: int32 or int64 ``[N + 1]``, boundaries of N sequences packed along T; then B is 1, else N is B.
            The state of a sequence without tokens is unchanged.
        qk_l2norm: L2-normalise q and k over K first, x / sqrt(sum x^2 + 1e-6).
        inplace: write the final state to `initial_state` and return this tensor.
        token_states: ``[B, T, HV, K, V]`` in the arithmetic's dtype, each ``[K, V]`` contiguous; receives the state
            after every token.
        slots: `initial_state` is a pool ``[P, HV, K, V]``, read and written in place.

    Returns:
        ``(o, final_state)``: ``[B, T, HV, V]`` in v's dtype and ``[N, HV, K, V]`` in the arithmetic's dtype.

    Raises:
        ValueError: `inplace` is set and `initial_state` is None, not contiguous or of another dtype, or the layout of
            `token_states` is wrong.

    Source: Gated Delta Networks (arXiv 2412.06464), equation 10; Kimi Linear (arXiv 2510.26692), equation 1.
    """
    check_no_gradients(inplace, token_states, q, k, v, g, beta, initial_state)
    B, T, HK, K = q.shape
    HV, V = v.shape[2:]
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    dtype = state_dtype(v.dtype)
    if slots is not None:
        final_state = initial_state = check_slots(initial_state, dtype)
    elif inplace:
        final_state = check_inplace(initial_state, dtype)
    else:
        final_state = v.new_empty(N, HV, K, V, dtype=dtype)
        initial_state = None if initial_state is None else initial_state.to(dtype).contiguous()
    if token_states is not None:
        check_token_states(token_states, dtype)
    o = v.new_empty(B, T, HV, V)
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    KP, VP = padded(K), padded(V)
    launch(
        "recurrent",
        dtype,
        N * HV,
        HV * K * V * max(B * T, N),
        KP * LANES + 5 * BLOCK * KP + 2 * BLOCK * VP + KP + 2 * BLOCK + 2 * LANES,
        (q, k, v, g, beta, initial_state, final_state, bounds, o, token_states, *(slots or (None, None))),
        N, T, HK, HV, K, V, g.dim() == 4, qk_l2norm, scale,
    )  # fmt: skip
    return o, final_state


# No chunk kernel is faster (`chunk`).
ANY_LENGTH = 2**63 - 1
for _op in ("recurrent_gdn", "recurrent_kda"):
    register(Kernel(_op, "numba", recurrent, why_not, fast_on=("cpu",), max_tokens=ANY_LENGTH, slots=True))
