"""The ops and what every kernel of them agrees on.

A kernel is called with inputs that `hf_gdn.ops` has checked, as

    fn(q, k, v, g, beta, *, scale, initial_state=None, cu_seqlens=None, qk_l2norm=False)  ->  (o, final_state)

q, k ``[B, T, HK, K]``; v ``[B, T, HV, V]``; g in natural log, ``[B, T, HV]`` for the gated delta rule (GDN) and
``[B, T, HV, K]`` for Kimi delta attention (KDA); beta ``[B, T, HV]``; states ``[N, HV, K, V]`` in fp32 (float64 for
float64 inputs), N the number of sequences: B, or ``len(cu_seqlens) - 1`` where B is 1 and sequences are packed along T.
o is ``[B, T, HV, V]`` in v's dtype; the final state is always returned. Inputs may be strided in their outer
dimensions; the last one is contiguous.

The recurrent ops take two more, for decoding:

    inplace=False       write the final state into `initial_state` and return that very tensor
    token_states=None   a tensor ``[B, T, HV, K, V]`` in fp32 that receives the state after every token

What is around the delta rule between a layer's projections (`hf_gdn.kernels.layer` has the types):

    prologue  fn(raw, weights, rule, *, window=None, keep=0, cu_seqlens=None, lengths=None)
              ->  (q, k, v, g, beta, window), as the delta rule takes them, q and k normalised
    norm      fn(o, z, weight, rule)  ->  y ``[B, T, HV, V]``
    step      fn(raw, weights, rule, window, state)  ->  y, with window and state moved on in place: all of it at once,
              for the next few tokens of a cache
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..registry import Op, register_op
from . import reference


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the recurrent state for inputs of `dtype`: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _make_inputs(per_channel: bool):
    def make_inputs(
        *, B=1, T=64, HK=2, HV=2, K=64, V=64, dtype=torch.float32, device="cpu", seed=0, decay=0.5, state=True
    ) -> dict[str, Any]:  # fmt: skip
        """Random arguments of a call: unit keys, log-decay uniform in [-decay, 0], beta in (0, 1)."""
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        gate = -decay * torch.rand(B, T, HV, *([K] if per_channel else []), generator=random, dtype=torch.float64)
        tensors = dict(
            q=F.normalize(normal(B, T, HK, K), dim=-1).to(dtype),
            k=F.normalize(normal(B, T, HK, K), dim=-1).to(dtype),
            v=normal(B, T, HV, V).to(dtype),
            g=gate.to(state_dtype(dtype)),
            beta=torch.rand(B, T, HV, generator=random, dtype=torch.float64).to(dtype),
            initial_state=(0.1 * normal(B, HV, K, V)).to(state_dtype(dtype)) if state else None,
        )
        moved = {name: None if x is None else x.to(device) for name, x in tensors.items()}
        return dict(moved, scale=K**-0.5, cu_seqlens=None, qk_l2norm=False)

    return make_inputs


CHUNK_GDN = register_op(Op("chunk_gdn", reference.delta_rule, _make_inputs(per_channel=False)))
RECURRENT_GDN = register_op(Op("recurrent_gdn", reference.delta_rule, _make_inputs(per_channel=False)))
CHUNK_KDA = register_op(Op("chunk_kda", reference.delta_rule, _make_inputs(per_channel=True)))
RECURRENT_KDA = register_op(Op("recurrent_kda", reference.delta_rule, _make_inputs(per_channel=True)))


def _make_layer_inputs(per_channel: bool, state: bool):
    def make_inputs(
        *, B=1, T=1, HK=2, HV=2, K=64, V=64, width=4, bias=False, dtype=torch.float32, device="cpu", seed=0, **rule
    ) -> dict[str, Any]:  # fmt: skip
        """Random arguments of a call, q, k, v and z interleaved by key head in one tensor as in Qwen3-Next."""
        from .layer import Raw, Rule, Weights

        random, group = torch.Generator().manual_seed(seed), HV // HK
        channels = 2 * HK * K + HV * V

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).to(device)

        q, k, v, z = normal(B, T, HK, 2 * K + 2 * group * V).split((K, K, group * V, group * V), -1)
        v, z = (x.unflatten(3, (group, V)) for x in (v, z))
        b, a = normal(B, T, HK, 2, group).unbind(3)
        weights = Weights(
            conv=0.5 * normal(channels, width), conv_bias=0.1 * normal(channels) if bias else None,
            A_log=normal(HV), dt_bias=normal(HV * K if per_channel else HV), norm=1 + 0.1 * normal(V),
        )  # fmt: skip
        raw = Raw(q, k, v, normal(B, T, HV * K) if per_channel else a, b, z)
        inputs = dict(raw=raw, weights=weights, rule=Rule(**rule), window=normal(B, channels, width))
        if state:
            return dict(inputs, state=0.1 * normal(B, HV, K, V, dtype=state_dtype(dtype)))
        return dict(inputs, keep=width)

    return make_inputs


def _make_norm_inputs(**sizes) -> dict[str, Any]:
    """Random arguments of a norm, z a slice of a projection."""
    inputs = _make_layer_inputs(False, False)(**sizes)
    raw, weights, rule = inputs["raw"], inputs["weights"], inputs["rule"]
    return dict(o=raw.v.flatten(2, 3).contiguous(), z=raw.z, weight=weights.norm, rule=rule)


STEP_GDN = register_op(Op("step_gdn", reference.step, _make_layer_inputs(per_channel=False, state=True)))
STEP_KDA = register_op(Op("step_kda", reference.step, _make_layer_inputs(per_channel=True, state=True)))
PROLOGUE_GDN = register_op(Op("prologue_gdn", reference.prologue, _make_layer_inputs(per_channel=False, state=False)))
PROLOGUE_KDA = register_op(Op("prologue_kda", reference.prologue, _make_layer_inputs(per_channel=True, state=False)))
GATED_NORM = register_op(Op("gated_norm", reference.gated_norm, _make_norm_inputs))
