"""Random inputs of every op, for tests and benchmarks. Values are drawn in float64 and then rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .contract import LayerSpec, Projections, Weights, state_dtype


def for_delta_rule(per_channel: bool) -> Callable[..., dict[str, Any]]:
    """Return the `make_inputs` of a delta rule with one decay per channel (KDA) or per head (GDN)."""

    def make_inputs(
        *, B=1, T=64, HK=2, HV=2, K=64, V=64, dtype=torch.float32, device="cpu", seed=0, decay=0.5, state=True
    ) -> dict[str, Any]:
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


def for_backward(per_channel: bool) -> Callable[..., dict[str, Any]]:
    """Return the `make_inputs` of a delta rule's gradients."""

    def make_inputs(*, seed=0, **sizes) -> dict[str, Any]:
        """Random arguments of a call, those of the delta rule with the same seed and the gradients of its results."""
        inputs = for_delta_rule(per_channel)(seed=seed, **sizes)
        q, v = inputs["q"], inputs["v"]
        random = torch.Generator().manual_seed(seed + 1)

        def normal(*shape, dtype):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).to(v.device)

        state = len(v), v.shape[2], q.shape[3], v.shape[3]
        return dict(
            inputs, d_o=normal(*v.shape, dtype=v.dtype), d_final_state=normal(*state, dtype=state_dtype(v.dtype))
        )

    return make_inputs


def for_layer(per_channel: bool, state: bool) -> Callable[..., dict[str, Any]]:
    """Return the `make_inputs` of a step (with a state) or of a prologue (without)."""

    def make_inputs(
        *, B=1, T=1, HK=2, HV=2, K=64, V=64, width=4, bias=False, dtype=torch.float32, device="cpu", seed=0, **spec
    ) -> dict[str, Any]:
        """Random arguments of a call; q, k, v and z are interleaved by key head in one tensor, as in Qwen3-Next."""
        random, group = torch.Generator().manual_seed(seed), HV // HK
        channels = 2 * HK * K + HV * V

        def normal(*shape, dtype=dtype):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).to(device)

        q, k, v, z = normal(B, T, HK, 2 * K + 2 * group * V).split((K, K, group * V, group * V), -1)
        v, z = (x.unflatten(3, (group, V)) for x in (v, z))
        b, a = normal(B, T, HK, 2, group).unbind(3)
        weights = Weights(
            conv=0.5 * normal(channels, width),
            conv_bias=0.1 * normal(channels) if bias else None,
            A_log=normal(HV),
            dt_bias=normal(HV * K if per_channel else HV),
            norm=1 + 0.1 * normal(V),
        )
        projected = Projections(q, k, v, normal(B, T, HV * K) if per_channel else a, b, z)
        inputs = dict(
            projected=projected, weights=weights, spec=LayerSpec(**spec), conv_state=normal(B, channels, width)
        )
        if state:
            return dict(inputs, state=0.1 * normal(B, HV, K, V, dtype=state_dtype(dtype)))
        return dict(inputs, keep=width)

    return make_inputs


def for_backward_prologue(per_channel: bool) -> Callable[..., dict[str, Any]]:
    """Return the `make_inputs` of a prologue's gradients."""

    def make_inputs(*, seed=0, **sizes) -> dict[str, Any]:
        """Random arguments of a call: those of the prologue with the same seed, and the gradients of its results."""
        inputs = for_layer(per_channel, state=False)(seed=seed, **sizes)
        q, v = inputs["projected"].q, inputs["projected"].v
        (B, T, HK, K), (R, V) = q.shape, v.shape[3:]
        random, HV, fp32 = torch.Generator().manual_seed(seed + 1), HK * R, state_dtype(q.dtype)

        def normal(*shape, dtype=q.dtype):
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).to(q.device)

        return dict(
            projected=inputs["projected"],
            weights=inputs["weights"],
            spec=inputs["spec"],
            d_q=normal(B, T, HK, K),
            d_k=normal(B, T, HK, K),
            d_v=normal(B, T, HV, V),
            d_g=normal(B, T, HV, *([K] if per_channel else []), dtype=fp32),
            d_beta=normal(B, T, HV, dtype=fp32),
            cu_seqlens=None,
            lengths=None,
        )

    return make_inputs


def for_gated_norm(**sizes: Any) -> dict[str, Any]:
    """Random arguments of a gated norm; z is a slice of a projection."""
    inputs = for_layer(per_channel=False, state=False)(**sizes)
    projected, weights, spec = inputs["projected"], inputs["weights"], inputs["spec"]
    return dict(o=projected.v.flatten(2, 3).contiguous(), z=projected.z, weight=weights.norm, spec=spec)


def for_backward_gated_norm(*, seed: int = 0, **sizes: Any) -> dict[str, Any]:
    """Random arguments of a gated norm's gradients: those of the norm with the same seed, and the gradient of y."""
    inputs = for_gated_norm(seed=seed, **sizes)
    o, random = inputs["o"], torch.Generator().manual_seed(seed + 1)
    d_y = torch.randn(o.shape, generator=random, dtype=torch.float64).to(o.dtype).to(o.device)
    return dict(o=o, z=inputs["z"], weight=inputs["weight"], d_y=d_y, spec=inputs["spec"])
