"""The calls on which a kernel has to prove itself: small, and hard where kernels and compilers go wrong.

A delta rule gets several chunks of an odd length, packed sequences (one of them a single token, one empty), an initial
state, single tokens that forget everything, beta of 0 and (where the kernel serves it) up to 2, and equal keys; then a
plain batch. The other ops get a single token and several, with and without what is optional. Heads and dimensions are
those of the request, since kernels are compiled for them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..registry import Request
from ..testing import call_changes
from ..testing.calls import Call
from ..testing.case import FAMILIES, Case
from ..testing.slots import in_slots

# The family whose options a layer's kernels are checked with, by variant.
_FAMILY = {"gdn": "qwen3_next", "kda": "kimi_linear"}
HARD = "packed, hard gates, equal keys"
_BOUNDS = (0, 1, 70, 70, 201)


def _hard(call: Call) -> Call:
    """A packed call: hard gates everywhere, beta of 0, equal keys in the last sequence."""
    call = call_changes.gated(call_changes.gate_mixed)(call)
    start = _BOUNDS[-2]
    beta, k, g = (call[name].clone() for name in ("beta", "k", "g"))
    beta[:, ::7] = 0
    k[:, start:] = k[:, start : start + 1]
    g[:, start:] *= torch.where(g[:, start:] > -1, 0.2, 1.0)
    return call_changes.packed(*_BOUNDS)({**call, "beta": beta, "k": k, "g": g})


def _harder(call: Call) -> Call:
    """The same with beta up to 2 in the sequences before the last."""
    call = _hard(call)
    beta = call["beta"].clone()
    beta[:, : _BOUNDS[-2]] *= 2
    return {**call, "beta": beta}


def proof_in_slots(request: Request) -> Case:
    """The call for a kernel whose states are in slots of a pool: packed sequences, one of them empty, or rows."""
    kind, _, variant = request.op.partition("_")
    sizes: dict[str, Any] = {**request.sizes, "dtype": request.dtype}
    if kind in ("step", "prologue"):
        sizes |= FAMILIES[_FAMILY[variant]][1]
    if kind == "step":
        return Case(request.op, "5 × 1", in_slots, {**sizes, "B": 5, "T": 1})
    return Case(request.op, "packed", in_slots, {**sizes, "T": 75}, call_changes.packed(0, 1, 3, 70, 70, 75))


def proofs(request: Request) -> list[Case]:
    """The calls for a kernel of the request's op, in the request's dtype and with its heads and dimensions."""
    kind, _, variant = request.op.partition("_")
    if kind == "backward" and "_" in variant:  # of the ops around the delta rule, on the calls of their forwards
        kind, _, variant = variant.partition("_")
    sizes: dict[str, Any] = {**request.sizes, "dtype": request.dtype}
    if kind in ("chunk", "backward", "recurrent"):
        # Chunk kernels refuse such a beta in 16 bits.
        change = _hard if kind != "recurrent" and request.dtype.itemsize == 2 else _harder
        hard = Case(request.op, HARD, sizes={**sizes, "T": _BOUNDS[-1]}, change=change)
        if kind != "recurrent":
            return [hard, Case(request.op, "2 × 67, no state", sizes={**sizes, "B": 2, "T": 67, "state": False})]
        step = Case(request.op, "2 × 1, in place", sizes={**sizes, "B": 2, "T": 1}, change=call_changes.in_place)
        return [hard, step]
    if kind == "gated":
        return [Case(request.op, "3 × 11", sizes={**sizes, "B": 3, "T": 11})]
    sizes |= FAMILIES[_FAMILY[variant]][1]
    if kind == "step":
        steep = call_changes.extreme_gates(25.0)
        return [
            Case(request.op, "1 × 1", sizes={**sizes, "B": 1, "T": 1}),
            Case(request.op, "2 × 3, steep gates", sizes={**sizes, "B": 2, "T": 3}, change=steep),
        ]
    padded = Case(request.op, "2 × 67, padded", sizes={**sizes, "B": 2, "T": 67}, change=call_changes.padded(67, 30))
    packed = call_changes.packed(0, 1, 30, 30, 67)
    no_cache = None if request.op.startswith("backward") else call_changes.without_conv_state
    new = replace(padded, name="1 × 64, no cache", sizes={**sizes, "T": 64}, change=no_cache)
    return [new, padded, replace(padded, name="packed", sizes={**sizes, "T": 67}, change=packed)]
