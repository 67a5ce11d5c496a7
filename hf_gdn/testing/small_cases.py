"""Calls that are small enough for a CPU and for Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from . import calls
from .call_changes import (
    beta_in_fp32,
    beta_up_to_two,
    conv_state_of,
    equal_keys,
    equal_keys_beta_two,
    extreme_gates,
    far_gates,
    gate_all,
    gate_average,
    gate_far_beyond,
    gate_minus_infinity,
    gate_mixed,
    gate_none,
    gate_one_far_beyond,
    gate_one_token,
    gate_some,
    gated,
    in_place,
    keys_of_size,
    l2norm,
    packed,
    padded,
    small_decay_after_large_sum,
    some_zero,
    without_conv_state,
    zero_rows,
    zero_tokens,
)
from .case import DTYPES, FAMILIES, Case, families_of, named_dtypes, named_sizes, norm_spec
from .invariants import (
    batched_equals_single,
    host_never_asked,
    inplace_equals_new,
    inputs_untouched,
    no_tokens,
    packed_equals_separate,
    same_bits,
    split_equals_whole,
    strided_inputs,
    token_states,
)
from .slots import in_slots
from .tolerances import ILL_CONDITIONED

# Also for eager's slabs and GVA with three value heads to a key head; the interpreter has smaller ones beside them.
_LONGER = {  # B, T, HK, HV, K, V
    "below_a_chunk": (1, 63, 2, 4, 8, 8),
    "a_chunk": (1, 64, 2, 2, 8, 8),
    "above_a_chunk": (2, 65, 1, 3, 8, 8),
    "more_odd_dims": (1, 100, 2, 4, 24, 40),
    "more_of_olmo": (1, 70, 1, 1, 96, 192),
    "longer_than_a_slab": (1, 1000, 1, 2, 8, 8),
}


_LONGER_BACKWARD: dict[str, dict[str, Any]] = {
    "float64": dict(T=100, HK=2, HV=4, K=24, V=40, dtype=torch.float64),
    "two_blocks": dict(T=257, HV=2, K=8, V=8),
    "four_blocks_float16": dict(T=1000, HV=2, K=8, V=8, dtype=torch.float16),
    "largest_dims": dict(T=5, K=256, V=256, dtype=torch.bfloat16),
}


def _delta_rule(op: str) -> Iterator[Case]:
    """Of all delta rules: long calls, dtypes, and extremes."""
    for name, sizes in named_sizes("B T HK HV K V", _LONGER):
        yield Case(op, name, sizes=sizes, interpret=False)
    odd: dict[str, Any] = dict(T=100, HK=2, HV=4, K=24, V=40)
    for dtype, name in named_dtypes((torch.float64, *DTYPES)):
        for state in (True, False):
            sizes = {**odd, "dtype": dtype, "state": state}
            yield Case(op, f"{name}{'' if state else '_no_state'}", sizes=sizes, interpret=False)
    for change in (gated(gate_none), gated(gate_all), gated(gate_some), gated(gate_mixed), beta_up_to_two, l2norm):
        yield Case(op, f"{change.__name__}_100", sizes=odd, change=change, interpret=False)
    yield Case(op, "100", split_equals_whole, odd, options=dict(sizes=[1, 16, 47, 35, 1]), interpret=False)
    yield Case(op, "100", packed_equals_separate, odd, packed(0, 30, 30, 31, 100), interpret=False)
    yield Case(op, "100_packed", sizes=odd, change=packed(0, 30, 30, 31, 100), interpret=False)
    yield Case(op, "100", same_bits, odd, interpret=False)
    yield Case(op, "100", inputs_untouched, odd, interpret=False)
    yield Case(op, "state", no_tokens, dict(B=2, T=0, HK=1, HV=2, K=8, V=8))
    yield Case(op, "no_state", no_tokens, dict(B=2, T=0, HK=1, HV=2, K=8, V=8, state=False))


def chunk(op: str) -> Iterator[Case]:
    one = dict(HK=1, HV=1, K=16, V=16)
    two = dict(one, T=130, HV=2, K=32, V=32)
    shapes: dict[str, dict[str, Any]] = {
        "no_tokens": dict(T=0),
        "one_token": dict(T=1),
        "63": dict(T=63, state=False),
        "64": dict(T=64),
        "65": dict(T=65, B=2),
        "66": dict(T=66, HK=2, HV=4),
        "130": dict(T=130),
        "1000": dict(T=1000, state=False),
        "olmo_dims": dict(T=70, K=96, V=192),
        "odd_dims": dict(T=66, K=20, V=36, HV=2),
        "130_float16": dict(two, dtype=torch.float16),
        "130_bfloat16": dict(two, dtype=torch.bfloat16),
        "wide_keys_float16": dict(T=65, K=128, dtype=torch.float16, state=False),
        "wide_keys_bfloat16": dict(T=65, K=128, dtype=torch.bfloat16, state=False),
        "largest_dims": dict(T=5, K=256, V=256, dtype=torch.bfloat16),
    }
    for name, sizes in shapes.items():
        yield Case(op, name, sizes={**one, **sizes})
    for dtype, name in named_dtypes(DTYPES):
        for gate in (gate_none, gate_some, gate_mixed, gate_all, *map(gate_average, (0.2, 2.0, 6.0))):
            yield Case(op, f"{gate.__name__}_{name}", sizes=dict(one, T=80, HV=2, dtype=dtype), change=gated(gate))
        if op == "chunk_gdn":
            for group in (1, 2, 3, 4):
                sizes = dict(one, T=66, HK=2, HV=2 * group, dtype=dtype)
                yield Case(op, f"{group}_value_heads_{name}", sizes=sizes)
        if dtype != torch.bfloat16:
            yield Case(op, f"l2norm_{name}", sizes=dict(one, T=66, HK=2, HV=4, K=20, dtype=dtype), change=l2norm)
    for gate in (gate_minus_infinity, gate_one_far_beyond):
        yield Case(op, gate.__name__, sizes=dict(one, T=80, HV=2), change=gated(gate))
    yield Case(op, "beta_up_to_two", sizes=dict(one, T=130, K=32), change=beta_up_to_two)
    yield Case(op, "equal_keys", sizes=dict(one, T=128), change=equal_keys)
    for name, size, beta, decay in (("large", 50.0, 4e-4, 0.2), ("small", 0.01, 1.0, 0.2), ("growing", 2.0, 1.0, 8.0)):
        sizes = dict(two, dtype=torch.bfloat16, decay=decay)
        yield Case(op, f"{name}_keys", sizes=sizes, change=keys_of_size(size, beta))
    yield Case(op, "small_decay", sizes=dict(one, T=192), change=small_decay_after_large_sum)
    for bounds in ((0, 0, 1, 1, 65, 66, 130, 130), (0, 64, 128), (0, 0)):
        for index, name in named_dtypes((torch.int32, torch.int64)):
            for state in (True, False):
                case = f"{len(bounds) - 1}_{name}{'' if state else '_no_state'}"
                change = packed(*bounds, state=state, index=index)
                yield Case(op, case, packed_equals_separate, dict(one, T=bounds[-1], HV=2), change)
    yield Case(op, "packed", host_never_asked, dict(one, T=70), packed(0, 1, 70, state=False))
    yield Case(op, "66", batched_equals_single, dict(one, B=2, T=66, HV=2))
    for at in (1, 64, 77, 129):
        pieces = dict(sizes=[at, 130 - at])
        yield Case(op, f"at_{at}", split_equals_whole, dict(one, T=130, K=32), options=pieces)
    sizes, options = dict(one, B=2, T=66, HK=2, HV=2), dict(layout=calls.of_one_projection)
    yield Case(op, "of_one_projection", strided_inputs, sizes, options=options)
    yield Case(op, "66", same_bits, dict(one, T=66, HV=2, K=32))
    yield Case(op, "66", inputs_untouched, dict(one, T=66, HV=2, K=32))
    mixed = (0, 0, 1, 1, 65, 66, 67, 130)
    for dtype, name in named_dtypes(DTYPES):
        yield Case(op, name, in_slots, dict(one, T=130, HV=2, dtype=dtype), packed(*mixed, index=torch.int32))
    yield Case(op, "odd_dims", in_slots, dict(T=66, HK=1, HV=2, K=20, V=36), packed(0, 1, 3, 66))
    if op == "chunk_kda":
        sizes = dict(T=4096, HK=1, HV=1, K=8, V=8, decay=0.0)
        yield Case(op, "no_decay_for_thousands_of_tokens", sizes=sizes, interpret=False)
    yield from _delta_rule(op)


def backward(op: str) -> Iterator[Case]:
    one = dict(HK=1, HV=1, K=16, V=16)
    two = dict(one, T=130, HV=2, K=32, V=32)
    shapes: dict[str, dict[str, Any]] = {
        "no_tokens": dict(T=0),
        "one_token": dict(T=1),
        "63": dict(T=63, state=False),
        "64": dict(T=64),
        "65": dict(T=65, B=2),
        "66": dict(T=66, HK=2, HV=4),
        "130": dict(T=130),
        "olmo_dims": dict(T=70, K=96, V=192),
        "odd_dims": dict(T=66, K=20, V=36, HV=2),
        "130_float16": dict(two, dtype=torch.float16),
        "130_bfloat16": dict(two, dtype=torch.bfloat16),
        "wide_keys_bfloat16": dict(T=65, K=128, dtype=torch.bfloat16, state=False),
    }
    for name, sizes in shapes.items():
        yield Case(op, name, sizes={**one, **sizes})
    for name, sizes in _LONGER_BACKWARD.items():
        yield Case(op, name, sizes={**one, **sizes}, interpret=False)
    for dtype, name in named_dtypes(DTYPES):
        for gate in (gate_none, gate_some, gate_mixed, gate_all, gate_average(2.0)):
            # e^-60, of which such gates' gradient is made, is zero in float16, in which scores of bfloat16 are too.
            tiny: dict[str, Any] = dict(negligible=1e-6) if gate is gate_all and dtype != torch.float32 else {}
            sizes = dict(one, T=80, HV=2, dtype=dtype)
            yield Case(op, f"{gate.__name__}_{name}", sizes=sizes, change=gated(gate), options=tiny)
        yield Case(op, f"l2norm_{name}", sizes=dict(one, T=66, HK=2, HV=4, K=20, dtype=dtype), change=l2norm)
    for gate in (gate_minus_infinity, gate_one_far_beyond):
        yield Case(op, gate.__name__, sizes=dict(one, T=80, HV=2), change=gated(gate))
    yield Case(op, "beta_up_to_two", sizes=dict(one, T=130, K=32), change=beta_up_to_two)
    yield Case(op, "equal_keys", sizes=dict(one, T=128), change=equal_keys)
    hard = dict(factor=ILL_CONDITIONED)
    yield Case(op, "equal_keys_beta_two", sizes=dict(one, T=128), change=equal_keys_beta_two, options=hard)
    yield Case(op, "keys_and_betas_of_zero", sizes=dict(one, T=70, HV=2), change=some_zero)
    yield Case(op, "small_decay", sizes=dict(one, T=192), change=small_decay_after_large_sum)
    for bounds in ((0, 0, 1, 1, 65, 66, 130, 130), (0, 64, 128), (0, 0)):
        for index, name in named_dtypes((torch.int32, torch.int64)):
            state = index == torch.int32
            change = packed(*bounds, state=state, index=index)
            sizes = dict(one, T=bounds[-1], HV=2)
            yield Case(op, f"{len(bounds) - 1}_{name}", packed_equals_separate, sizes, change)
            yield Case(op, f"packed_{len(bounds) - 1}_{name}", sizes=sizes, change=change)
    yield Case(op, "packed", host_never_asked, dict(one, T=70), packed(0, 1, 70, state=False))
    yield Case(op, "66", batched_equals_single, dict(one, B=2, T=66, HV=2))
    sizes, options = dict(one, B=2, T=66, HK=2, HV=2), dict(layout=calls.of_one_projection)
    yield Case(op, "of_one_projection", strided_inputs, sizes, options=options)
    yield Case(op, "66", same_bits, dict(one, T=66, HV=2, K=32))
    yield Case(op, "66", inputs_untouched, dict(one, T=66, HV=2, K=32))


def recurrent(op: str) -> Iterator[Case]:
    shapes = {  # B, T, HK, HV, K, V
        "one_token": (2, 1, 2, 2, 16, 16),
        "two_tokens": (1, 2, 1, 2, 16, 8),
        "a_draft": (1, 16, 1, 2, 8, 32),
        "many_tokens": (1, 63, 1, 1, 8, 8),
        "odd_dims": (1, 3, 2, 4, 24, 40),
        "olmo_dims": (1, 2, 1, 1, 96, 192),
        "smallest_dims": (1, 3, 1, 3, 1, 1),
        "largest_dims": (1, 1, 1, 1, 256, 256),
    }
    for name, sizes in named_sizes("B T HK HV K V", shapes):
        yield Case(op, name, sizes=sizes)
    two, odd = dict(T=2, HK=1, HV=2, K=16, V=8), dict(T=3, HK=2, HV=4, K=24, V=40)
    for dtype, name in named_dtypes(DTYPES):
        yield Case(op, f"odd_dims_{name}", sizes=dict(odd, dtype=dtype))
        yield Case(op, f"odd_dims_{name}_no_state", sizes=dict(odd, dtype=dtype, state=False))
        if dtype != torch.float16:
            yield Case(op, f"l2norm_{name}", sizes=dict(odd, dtype=dtype), change=l2norm)
    yield Case(op, "beta_in_fp32", sizes=dict(two, dtype=torch.bfloat16), change=beta_in_fp32)
    for gate in (gate_none, gate_all, gate_far_beyond, gate_one_token, gate_minus_infinity):
        yield Case(op, gate.__name__, sizes=dict(T=5, HK=1, HV=2, K=8, V=16), change=gated(gate))
    yield Case(op, "odd_dims", inplace_equals_new, odd)
    yield Case(op, "in_place", no_tokens, dict(two, T=0), in_place)
    yield Case(op, "two_tokens", inputs_untouched, two)
    yield Case(op, "four_tokens", token_states, dict(B=2, T=4, HK=1, HV=2, K=8, V=24))
    pieces = dict(T=6, HK=1, HV=2, K=24, V=16)
    yield Case(op, "l2norm", split_equals_whole, pieces, l2norm, dict(sizes=[1, 1, 4]))
    yield Case(op, "in_place", split_equals_whole, pieces, in_place, dict(sizes=[1, 1, 4]))
    yield Case(op, "two_tokens", batched_equals_single, dict(B=3, T=2, HK=1, HV=2, K=24, V=16))
    yield Case(op, "odd_dims", same_bits, dict(odd, dtype=torch.bfloat16))
    bounds, nine = (0, 3, 3, 4, 9), dict(T=9, HK=1, HV=2, K=8, V=24)
    for index, name in named_dtypes((torch.int32, torch.int64)):
        for state in (True, False):
            case, change = f"{name}{'' if state else '_no_state'}", packed(*bounds, state=state, index=index)
            yield Case(op, case, packed_equals_separate, nine, change)
            yield Case(op, f"packed_{case}", sizes=nine, change=change)
    for dtype, name in named_dtypes(DTYPES):
        yield Case(op, name, in_slots, dict(nine, dtype=dtype), packed(0, 3, 3, 4, 9, index=torch.int32))
    yield Case(op, "rows", in_slots, dict(B=4, T=2, HK=1, HV=2, K=24, V=40))
    yield Case(op, "larger_tensors", strided_inputs, dict(B=2, T=3, HK=1, HV=2, K=24, V=40, dtype=torch.bfloat16))
    yield from _delta_rule(op)


def _layer(op: str, names: str, shapes: Mapping[str, tuple[int, ...]], odd: str, two: str) -> Iterator[Case]:
    """Of steps and prologues: shapes, families, and gates. KDA has as many key heads as value heads."""
    families, by_name = families_of(op), dict(named_sizes(names, shapes))
    first = next(iter(families.values()))
    for sizes in by_name.values():
        sizes["HK"] = sizes["HV"] if op.endswith("kda") else sizes["HK"]
    for name, sizes in by_name.items():
        yield Case(op, name, sizes={**sizes, **first})
    for family, spec in families.items():
        for dtype, name in named_dtypes(DTYPES):
            bias = "prologue" in op
            yield Case(op, f"{family}_{name}", sizes={**by_name[odd], **spec, "dtype": dtype, "bias": bias})
    for family in {"gdn": ("qwen3_next",), "kda": ("kimi_linear", "glm5_next")}[op[-3:]]:
        # A prologue returns the decay itself, which fp32 cannot hold in full at -100; sums of its gradients at -60.
        far = () if op.startswith("backward") else (-60.0,) if "prologue" in op else (-100.0,)
        for shift in (*far, -18.0, 25.0, 80.0):
            sizes = {**by_name[two], **families[family]}
            yield Case(op, f"{family}_gates_{shift:+.0f}", sizes=sizes, change=extreme_gates(shift))
    yield Case(op, "bias", sizes={**by_name[odd], **first, "bias": True})


def step(op: str) -> Iterator[Case]:
    shapes = {  # B, T, HK, HV, K, V, width
        "one_token": (2, 1, 2, 4, 16, 16, 4),
        "two_tokens": (1, 2, 1, 2, 16, 8, 4),
        "a_draft": (1, 16, 1, 2, 8, 32, 4),
        "as_many_as_the_conv_state": (1, 4, 1, 1, 8, 8, 4),
        "odd_dims": (1, 3, 2, 4, 24, 40, 4),
        "olmo_dims": (1, 2, 1, 1, 96, 192, 4),
        "smallest_dims": (1, 3, 1, 3, 1, 1, 2),
        "no_convolution": (1, 2, 1, 2, 8, 8, 1),
        "width_3": (2, 2, 1, 2, 8, 8, 3),
        "width_8": (1, 3, 1, 2, 8, 8, 8),
    }
    yield from _layer(op, "B T HK HV K V width", shapes, "odd_dims", "two_tokens")
    families, kda = families_of(op), op.endswith("kda")
    first = dict(HK=2 if kda else 1, HV=2, K=8, **next(iter(families.values())))
    for cuts in ([1] * 7, [3, 4], [5, 1, 1]):
        sizes = dict(first, T=7, V=16, dtype=torch.bfloat16)
        yield Case(op, "_".join(map(str, cuts)), split_equals_whole, sizes, options=dict(sizes=cuts))
    yield Case(op, "three", batched_equals_single, dict(first, B=3, T=2, V=8))
    odd = dict(first, T=3, HK=4 if kda else 2, HV=4, K=24, V=40)
    yield Case(op, "separate", strided_inputs, odd, options=dict(layout=calls.of_separate_projections))
    yield Case(op, "odd_dims", same_bits, odd)
    yield Case(op, "odd_dims", inputs_untouched, odd)
    for dtype, name in named_dtypes(DTYPES):
        yield Case(op, name, in_slots, dict(first, B=5, V=24, dtype=dtype))
    yield Case(op, "two_tokens", in_slots, dict(first, B=3, T=2, V=8, width=3))
    for family, spec in families.items():
        more = dict(B=2, HK=4 if kda else 2, HV=4, K=12, V=20, bias=True, **spec)
        for T in (1, 3):
            for width in (1, 2, 4, 8):
                sizes = dict(more, T=T, width=width)
                yield Case(op, f"{family}_{T}_tokens_width_{width}", sizes=sizes, interpret=False)
        yield Case(op, family, split_equals_whole, dict(more, T=3), options=dict(sizes=[1, 1, 1]), interpret=False)


def prologue(op: str) -> Iterator[Case]:
    shapes = {  # B, T, HK, HV, K, V, width
        "one_token": (2, 1, 2, 4, 16, 16, 4),
        "fewer_than_the_conv_state": (1, 2, 1, 2, 16, 8, 4),
        "a_tile": (1, 64, 1, 1, 8, 8, 4),
        "a_token_more": (2, 65, 1, 2, 8, 16, 4),
        "odd_dims": (1, 70, 2, 4, 24, 40, 4),
        "olmo_dims": (1, 5, 1, 1, 96, 192, 4),
        "largest_dims": (1, 33, 1, 1, 256, 256, 4),
        "smallest_dims": (1, 3, 1, 3, 1, 1, 2),
        "no_convolution": (1, 5, 1, 2, 8, 8, 1),
        "width_3": (2, 9, 1, 2, 8, 8, 3),
        "width_8": (1, 66, 1, 2, 8, 8, 8),
    }
    yield from _layer(op, "B T HK HV K V width", shapes, "width_3", "fewer_than_the_conv_state")
    families, kda = families_of(op), op.endswith("kda")
    first = dict(HK=2 if kda else 1, HV=2, K=8, V=8, **next(iter(families.values())))
    more = dict(first, B=2, T=65, V=16)
    yield Case(op, "no_cache", sizes=more, change=conv_state_of(0))
    yield Case(op, "empty_cache", sizes=more, change=without_conv_state)
    yield Case(op, "wider_conv_state", sizes=dict(first, B=2, T=9, width=3), change=conv_state_of(7))
    for lengths in ((66, 1), (64, 65), (0, 3)):
        for cache in (True, False):
            name = f"padded_{lengths[0]}_{lengths[1]}{'' if cache else '_empty_cache'}"
            yield Case(op, name, sizes=dict(first, B=2, T=66), change=padded(*lengths, cache=cache))
    for bounds in ((0, 0, 1, 1, 65, 66, 130), (0, 64, 128), (0, 3, 5, 6, 70, 70)):
        for index, name in named_dtypes((torch.int32, torch.int64)):
            case, change, sizes = f"{len(bounds) - 1}_{name}", packed(*bounds, index=index), dict(first, T=bounds[-1])
            yield Case(op, case, packed_equals_separate, sizes, change)
            yield Case(op, f"packed_{case}", sizes=sizes, change=change)
    for at in (1, 2, 3, 5, 64, 69):
        sizes = dict(first, B=2, T=70, dtype=torch.bfloat16)
        yield Case(op, f"at_{at}", split_equals_whole, sizes, options=dict(sizes=[at, 70 - at]))
    mixed = (0, 0, 1, 3, 4, 4, 6, 70, 75)
    for dtype, name in named_dtypes(DTYPES):
        yield Case(op, name, in_slots, dict(first, T=75, dtype=dtype, bias=True), packed(*mixed, index=torch.int32))
    for width in (1, 2, 8):
        yield Case(op, f"width_{width}", in_slots, dict(first, T=75, width=width), packed(*mixed))
    odd = dict(first, T=70, HK=4 if kda else 2, HV=4, K=24, V=40)
    yield Case(op, "separate", strided_inputs, odd, options=dict(layout=calls.of_separate_projections))
    yield Case(op, "a_token_more", inputs_untouched, more)
    yield Case(op, "a_token_more", same_bits, more)
    yield Case(op, "a_token_more", batched_equals_single, more)
    yield Case(op, "packed", host_never_asked, dict(first, T=70), packed(0, 1, 70))
    for family, spec in families.items():
        sizes = dict(B=2, T=9, HK=4 if kda else 2, HV=4, K=12, V=20, bias=True, **spec)
        for name, rows, context in (
            ("cache", 2, None),
            ("empty_cache", 2, without_conv_state),
            ("no_cache", 2, conv_state_of(0)),
            ("padded", 2, padded(9, 2)),
            ("packed", 1, packed(0, 0, 2, 3, 9, state=False)),
        ):
            yield Case(op, f"{family}_{name}", sizes=dict(sizes, B=rows), change=context, interpret=False)


def backward_prologue(op: str) -> Iterator[Case]:
    shapes = {  # B, T, HK, HV, K, V, width
        "one_token": (2, 1, 2, 4, 16, 16, 4),
        "fewer_than_the_window": (1, 2, 1, 2, 16, 8, 4),
        "a_chunk": (1, 64, 1, 1, 8, 8, 4),
        "a_token_more": (2, 65, 1, 2, 8, 16, 4),
        "more_than_a_program": (1, 258, 1, 1, 8, 8, 4),
        "odd_dims": (1, 19, 2, 4, 24, 40, 4),
        "olmo_dims": (1, 18, 1, 1, 96, 192, 4),
        "largest_dims": (1, 18, 1, 1, 256, 256, 4),
        "smallest_dims": (1, 3, 1, 3, 2, 1, 2),  # with K = 1, nothing is left of the gradients of q and k
        "no_convolution": (1, 5, 1, 2, 8, 8, 1),
        "width_3": (2, 9, 1, 2, 8, 8, 3),
        "width_8": (1, 66, 1, 2, 8, 8, 8),
    }
    yield from _layer(op, "B T HK HV K V width", shapes, "width_3", "fewer_than_the_window")
    families, kda = families_of(op), op.endswith("kda")
    first = dict(HK=2 if kda else 1, HV=2, K=8, V=8, **next(iter(families.values())))
    for family, spec in families.items():
        sizes, shut = {**first, **spec, "B": 2, "T": 9}, dict(negligible=1e-30)
        yield Case(op, f"{family}_gates_-300", sizes=sizes, change=extreme_gates(-300.0), options=shut)
    yield Case(op, "tokens_of_zero", sizes=dict(first, T=20, bias=True), change=zero_tokens)
    for lengths in ((66, 1), (64, 65), (0, 3)):
        name = f"padded_{lengths[0]}_{lengths[1]}"
        yield Case(op, name, sizes=dict(first, B=2, T=66), change=padded(*lengths))
    for bounds in ((0, 0, 1, 1, 65, 66, 70), (0, 64, 128), (0, 3, 5, 6, 20, 20)):
        for index, name in named_dtypes((torch.int32, torch.int64)):
            case, change, sizes = f"{len(bounds) - 1}_{name}", packed(*bounds, index=index), dict(first, T=bounds[-1])
            yield Case(op, case, packed_equals_separate, sizes, change)
            yield Case(op, f"packed_{case}", sizes=sizes, change=change)
    odd = dict(first, T=9, K=24, V=40)
    yield Case(op, "separate", strided_inputs, odd, options=dict(layout=calls.of_separate_projections))
    yield Case(op, "few", inputs_untouched, dict(first, T=9))
    yield Case(op, "more_than_a_program", same_bits, dict(first, T=258, HK=1, HV=1))
    yield Case(op, "two", batched_equals_single, dict(first, B=2, T=18))
    yield Case(op, "packed", host_never_asked, dict(first, T=20), packed(0, 1, 20))


def _norms(op: str, by_name: dict[str, dict[str, Any]]) -> Iterator[Case]:
    """All sizes, and the norms of all families in all dtypes."""
    for name, sizes in by_name.items():
        yield Case(op, name, sizes=sizes)
    for family, (_, spec) in FAMILIES.items():
        for dtype, name in named_dtypes(DTYPES):
            sizes = {**by_name["odd_dims"], **norm_spec(spec), "dtype": dtype}
            yield Case(op, f"{family}_{name}", sizes=sizes)


def gated_norm(op: str) -> Iterator[Case]:
    shapes = {  # B, T, HK, HV, V
        "one_row": (1, 1, 1, 1, 16),
        "more_than_a_program": (2, 67, 2, 4, 32),
        "odd_dims": (2, 3, 2, 6, 40),
        "smallest": (1, 2, 1, 3, 1),
        "wide": (1, 9, 1, 2, 192),
        "no_rows": (1, 0, 1, 2, 16),
    }
    by_name = {name: dict(sizes, K=8) for name, sizes in named_sizes("B T HK HV V", shapes)}
    yield from _norms(op, by_name)
    for gate in ("silu", "sigmoid"):
        for fp32 in (False, True):
            sizes = dict(B=2, T=5, HK=2, HV=4, K=8, V=20, gate=gate, norm_in_fp32=fp32)
            yield Case(op, f"{gate}_{'fp32' if fp32 else 'dtype'}", sizes=sizes, interpret=False)
    half = {**by_name["more_than_a_program"], "dtype": torch.bfloat16}
    yield Case(op, "bfloat16", batched_equals_single, half)
    yield Case(op, "bfloat16", split_equals_whole, half, options=dict(sizes=[1, 66]))
    yield Case(op, "bfloat16", same_bits, half)
    yield Case(op, "bfloat16", inputs_untouched, half)


def backward_gated_norm(op: str) -> Iterator[Case]:
    shapes = {  # B, T, HK, HV, V
        "one_row": (1, 1, 1, 1, 16),
        "more_than_a_program": (1, 67, 2, 8, 64),
        "odd_dims": (2, 3, 2, 6, 40),
        "smallest": (1, 2, 1, 3, 2),  # with one column, nothing is left of the gradient of o
        "wide": (1, 9, 1, 2, 192),
        "widest": (1, 3, 1, 2, 256),
        "no_rows": (1, 0, 1, 2, 16),
    }
    by_name = {name: dict(sizes, K=8) for name, sizes in named_sizes("B T HK HV V", shapes)}
    yield from _norms(op, by_name)
    for change in (zero_rows, far_gates):
        for gate in ("silu", "sigmoid"):
            sizes = dict(by_name["odd_dims"], gate=gate)
            yield Case(op, f"{change.__name__}_{gate}", sizes=sizes, change=change)
    half = {**by_name["more_than_a_program"], "dtype": torch.bfloat16}
    yield Case(op, "bfloat16", batched_equals_single, dict(half, B=2, T=9))
    yield Case(op, "bfloat16", split_equals_whole, half, options=dict(sizes=[1, 66]))
    yield Case(op, "bfloat16", same_bits, half)
    yield Case(op, "bfloat16", inputs_untouched, half)
