"""Calls with the shapes of real layers, for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .call_changes import beta_up_to_two, gate_all, gate_mixed, gate_some, gated, l2norm, packed, padded, to_normalise
from .case import DTYPES, FAMILIES, Case, families_of, named_dtypes, norm_spec
from .invariants import (
    batched_equals_single,
    packed_equals_separate,
    same_bits,
    split_equals_whole,
    strided_inputs,
    token_states,
)

# HK, HV, K and V of real layers.
LAYERS = {
    "qwen3_next": (16, 32, 128, 128),
    "equal_heads": (32, 32, 128, 128),
    "olmo_hybrid": (30, 30, 96, 192),
    "largest": (2, 4, 256, 256),
}


def _real(op: str, layer: str = "qwen3_next") -> dict[str, Any]:
    HK, HV, K, V = LAYERS.get(layer, LAYERS["equal_heads"])
    one_head = op in ("chunk_kda", "backward_kda", "backward_prologue_kda")
    return dict(HK=HV if one_head else HK, HV=HV, K=K, V=V)


def chunk(op: str) -> Iterator[Case]:
    real, bf16 = _real(op), torch.bfloat16
    for dtype, name in named_dtypes(DTYPES):
        for B, T in ((1, 1), (1, 63), (1, 512), (1, 1000), (1, 2048), (8, 512)):
            yield Case(op, f"{B}x{T}_{name}", sizes=dict(real, B=B, T=T, dtype=dtype))
        for K, V in ((64, 64), (96, 192), (256, 256), (20, 36)):
            yield Case(op, f"{K}x{V}_{name}", sizes=dict(T=200, HK=2, HV=4, K=K, V=V, dtype=dtype))
        yield Case(op, f"l2norm_{name}", sizes=dict(real, T=200, dtype=dtype), change=l2norm)
        for decay in (0.0, 0.4, 4.0, 12.0, 60.0):  # from none to everything
            yield Case(op, f"decay_{decay}_{name}", sizes=dict(real, T=512, dtype=dtype, decay=decay))
        for gate in (gate_some, gate_mixed, gate_all):
            yield Case(op, f"{gate.__name__}_{name}", sizes=dict(real, T=2048, dtype=dtype), change=gated(gate))
        yield Case(op, f"beta_up_to_two_{name}", sizes=dict(real, T=512, dtype=dtype), change=beta_up_to_two)
        yield Case(op, name, same_bits, dict(real, T=1000, dtype=dtype), options=dict(runs=6))
    # Enough heads for the other row of the launch table.
    yield Case(op, "wide_scan", sizes=dict(real, B=8, T=1000, dtype=bf16, state=False))
    for at in (1, 64, 100, 511):
        yield Case(op, f"at_{at}", split_equals_whole, dict(real, T=512), options=dict(sizes=[at, 512 - at]))
    yield Case(op, "larger_tensors", strided_inputs, dict(real, B=2, T=200, dtype=bf16))


def backward(op: str) -> Iterator[Case]:
    real, bf16 = _real(op), torch.bfloat16
    for dtype, name in named_dtypes(DTYPES):
        for B, T in ((1, 1), (1, 63), (1, 512), (1, 1000), (8, 512)):
            yield Case(op, f"{B}x{T}_{name}", sizes=dict(real, B=B, T=T, dtype=dtype))
        for K, V in ((64, 64), (96, 192), (256, 256), (20, 36)):
            yield Case(op, f"{K}x{V}_{name}", sizes=dict(T=200, HK=2, HV=4, K=K, V=V, dtype=dtype))
        yield Case(op, f"l2norm_{name}", sizes=dict(real, T=200, dtype=dtype), change=l2norm)
        for decay in (0.0, 4.0, 60.0):  # from none to everything
            yield Case(op, f"decay_{decay}_{name}", sizes=dict(real, T=512, dtype=dtype, decay=decay))
        for gate in (gate_some, gate_mixed, gate_all):
            options = dict(negligible=1e-6) if gate is gate_all and dtype != torch.float32 else {}
            sizes = dict(real, T=512, dtype=dtype)
            yield Case(op, f"{gate.__name__}_{name}", sizes=sizes, change=gated(gate), options=options)
        yield Case(op, name, same_bits, dict(real, T=1000, dtype=dtype), options=dict(runs=6))
    yield Case(op, "200", packed_equals_separate, dict(real, T=200), packed(0, 1, 70, 70, 200))
    yield Case(op, "200", batched_equals_single, dict(real, B=3, T=200, dtype=bf16))
    yield Case(op, "larger_tensors", strided_inputs, dict(real, B=2, T=200, dtype=bf16))


def recurrent(op: str) -> Iterator[Case]:
    half = {layer: dict(_real(op, layer), dtype=torch.bfloat16) for layer in LAYERS}
    for layer, sizes in half.items():
        for B in (1, 8, 32):
            for T in (1, 4, 16):
                yield Case(op, f"{layer}_{B}x{T}", sizes=dict(sizes, B=B, T=T), change=to_normalise)
    for dtype, name in named_dtypes(DTYPES):
        for T in (1, 4, 1000):
            for state in (True, False):
                sizes = dict(_real(op), B=2, T=T, dtype=dtype, state=state)
                yield Case(op, f"{T}_{name}{'' if state else '_no_state'}", sizes=sizes)
    sizes = half["qwen3_next"]
    for decay in (0.0, 60.0, 1e4):
        yield Case(op, f"decay_{decay:.0f}", sizes=dict(sizes, T=16, decay=decay))
    for invariant, options in (
        (same_bits, {}),
        (batched_equals_single, dict(parts=[slice(1), slice(32)])),
        (split_equals_whole, dict(sizes=[1] * 4)),
    ):
        yield Case(op, "many_heads", invariant, dict(sizes, B=160, T=4), to_normalise, options)
    yield Case(op, "four_tokens", token_states, dict(sizes, B=2, T=4))
    for index, name in named_dtypes((torch.int32, torch.int64)):
        change = packed(0, 5, 5, 6, 70, index=index)
        yield Case(op, name, packed_equals_separate, dict(sizes, T=70), change)
        yield Case(op, f"packed_{name}", sizes=dict(sizes, T=70), change=change)
    # 70,000 heads; grid y and z end at 65,535.
    yield Case(op, "70000_heads", sizes=dict(B=70_000, T=1, HK=1, HV=1, K=8, V=8, dtype=torch.bfloat16))


def _real_layers(op: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Families with the op's variant: name, sizes of their layers, spec."""
    for name, spec in families_of(op).items():
        yield name, _real(op, name), spec


def step(op: str) -> Iterator[Case]:
    for family, sizes, spec in _real_layers(op):
        if family in ("qwen3_next", "olmo_hybrid", "kimi_linear"):
            for B in (1, 8, 32):
                for T in (1, 4, 16):
                    half = dict(sizes, B=B, T=T, dtype=torch.bfloat16, **spec)
                    yield Case(op, f"{family}_{B}x{T}", sizes=half)
        for dtype, name in named_dtypes(DTYPES):
            yield Case(op, f"{family}_{name}", sizes=dict(sizes, B=2, T=3, dtype=dtype, **spec))
    _, sizes, spec = next(_real_layers(op))
    half = dict(sizes, dtype=torch.bfloat16, **spec)
    for width in (1, 2, 3, 8):
        yield Case(op, f"width_{width}", sizes=dict(half, B=2, T=3, width=width, bias=True))
    yield Case(op, "many_heads", same_bits, dict(half, B=160, T=4))
    yield Case(
        op, "many_heads", batched_equals_single, dict(half, B=160, T=4), options=dict(parts=[slice(1), slice(32)])
    )
    yield Case(op, "many_heads", split_equals_whole, dict(half, B=160, T=4), options=dict(sizes=[1] * 4))


def prologue(op: str) -> Iterator[Case]:
    for family, sizes, spec in _real_layers(op):
        if family in ("qwen3_next", "olmo_hybrid", "kimi_linear"):
            half = dict(sizes, dtype=torch.bfloat16, **spec)
            for B, T in ((1, 1), (1, 17), (2, 63), (1, 64), (1, 1000), (8, 512)):
                yield Case(op, f"{family}_{B}x{T}", sizes=dict(half, B=B, T=T))
            yield Case(op, f"{family}_padded", sizes=dict(half, B=2, T=200), change=padded(200, 3))
            change = packed(0, 0, 1, 65, 66, 200, state=False)
            yield Case(op, f"{family}_packed", sizes=dict(half, T=200), change=change)
            parts = dict(parts=[slice(4, 5)])
            yield Case(op, family, same_bits, dict(half, B=9, T=300))
            yield Case(op, family, batched_equals_single, dict(half, B=9, T=300), options=parts)
        for dtype, name in named_dtypes(DTYPES):
            yield Case(op, f"{family}_{name}", sizes=dict(sizes, B=2, T=70, dtype=dtype, bias=True, **spec))
    _, sizes, spec = next(_real_layers(op))
    for width in (1, 2, 3, 8):
        half = dict(sizes, B=2, T=70, width=width, dtype=torch.bfloat16, **spec)
        yield Case(op, f"width_{width}", sizes=half)


def backward_prologue(op: str) -> Iterator[Case]:
    for family, sizes, spec in _real_layers(op):
        if family in ("qwen3_next", "olmo_hybrid", "kimi_linear"):
            half = dict(sizes, dtype=torch.bfloat16, **spec)
            for B, T in ((1, 1), (1, 17), (2, 63), (1, 64), (1, 1000), (8, 512)):
                yield Case(op, f"{family}_{B}x{T}", sizes=dict(half, B=B, T=T))
            yield Case(op, f"{family}_padded", sizes=dict(half, B=2, T=200), change=padded(200, 3))
            yield Case(op, f"{family}_packed", sizes=dict(half, T=200), change=packed(0, 0, 1, 65, 66, 200))
            yield Case(op, family, same_bits, dict(half, B=9, T=300), options=dict(runs=6))
        for dtype, name in named_dtypes(DTYPES):
            yield Case(op, f"{family}_{name}", sizes=dict(sizes, B=2, T=70, dtype=dtype, bias=True, **spec))
    _, sizes, spec = next(_real_layers(op))
    for width in (1, 2, 3, 8):
        half = dict(sizes, B=2, T=70, width=width, dtype=torch.bfloat16, **spec)
        yield Case(op, f"width_{width}", sizes=half)


def gated_norm(op: str) -> Iterator[Case]:
    for family in ("qwen3_next", "olmo_hybrid", "kimi_linear"):
        for dtype, name in named_dtypes(DTYPES):
            sizes = dict(_real(op, family), B=3, T=100, dtype=dtype, **norm_spec(FAMILIES[family][1]))
            yield Case(op, f"{family}_{name}", sizes=sizes)
