"""The table of what a kernel has to get right: for every op, calls by name, and the invariant that holds for each.

`cases(op)` are small enough for a CPU and for Triton's interpreter; `cases(op, "cuda")` have the shapes of real layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..registry import Kernel, Request
from . import calls
from .calls import Call
from .invariants import (
    batched_equals_single,
    host_never_asked,
    inplace_equals_new,
    inputs_untouched,
    matches_reference,
    no_tokens,
    packed_equals_separate,
    same_bits,
    split_equals_whole,
    strided_inputs,
    token_states,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)
# By model family: the variant of its delta rule, and its `LayerSpec` where it differs from the default.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("gdn", {}),
    "qwen4_exp": ("gdn", dict(gate="sigmoid")),
    "olmo_hybrid": ("gdn", dict(beta_scale=2.0, eps=1e-5)),
    "kimi_linear": ("kda", dict(gate="sigmoid", norm_in_fp32=True)),
    "glm5_next": ("kda", dict(gate="sigmoid", norm_in_fp32=True, lower_bound=-5.0)),
    "bailing_hybrid": ("kda", dict(gate="sigmoid", norm_in_fp32=True, lower_bound=-5.0, decay_in_dtype=True)),
}
# HK, HV, K and V of real layers.
LAYERS = {
    "qwen3_next": (16, 32, 128, 128),
    "equal_heads": (32, 32, 128, 128),
    "olmo_hybrid": (30, 30, 96, 192),
    "largest": (2, 4, 256, 256),
}


@dataclass(frozen=True)
class Case:
    """A call of an op, and what holds for it.

    Args:
        op: name of the op.
        name: of the call, unique among the op's cases of one invariant.
        invariant: a function of `hf_gdn.testing.invariants`.
        sizes: keyword arguments of the op's `make_inputs`.
        change: what makes the call of these inputs, if they are not the call already.
        options: further keyword arguments of the invariant.
        interpret: whether Triton's interpreter, which is slow, runs it too; where not, it runs a smaller call like it.
    """

    op: str
    name: str
    invariant: Callable[..., Any] = matches_reference
    sizes: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Call], Call] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    interpret: bool = True

    def __str__(self) -> str:
        return f"{self.op}-{self.invariant.__name__}-{self.name}"

    def call(self, device: str | torch.device = "cpu") -> Call:
        """The arguments, with the same numbers each time."""
        inputs = registry.ops()[self.op].make_inputs(**self.sizes, device=device)
        return inputs if self.change is None else self.change(inputs)

    def why_not(self, kernel: Kernel, device_type: str = "cpu") -> str | None:
        """Why a kernel does not serve the call, or None if it does."""
        sizes = {"HK": 2, "HV": 2, "K": 64, "V": 64, "dtype": torch.float32, **self.sizes}
        heads = (sizes[name] for name in ("HK", "HV", "K", "V"))
        return kernel.why_not(Request(self.op, device_type, sizes["dtype"], *heads))

    def check(self, kernel: Kernel, device: str | torch.device = "cpu", apart: float = 0.0) -> None:
        """Raise AssertionError where the kernel does not keep the invariant.

        Args:
            kernel: a kernel of `op`.
            device: where to call it.
            apart: see `hf_gdn.testing.invariants`.
        """
        self.invariant(kernel, self.call(device), apart, **self.options)


def check_kernel(kernel: Kernel, device: str = "cpu", apart: float = 0.0, asynchronous: bool | None = None) -> int:
    """Run every case of the kernel's op that the kernel does not refuse; returns how many there were.

    Args:
        kernel: the kernel, registered or not.
        device: ``"cpu"`` for small calls, ``"cuda"`` for calls with the shapes of real layers.
        apart: relative error allowed between a call and the same in pieces, batched or packed; 0 asks for equal bits.
        asynchronous: the kernel promises never to read a tensor's values on the host; true by default on a GPU.

    Raises:
        AssertionError: an invariant does not hold; the message names the case.

    Example:
        >>> from hf_gdn import registry
        >>> from hf_gdn.testing import check_kernel
        >>> check_kernel(registry.get("gated_norm", "eager"), apart=1e-6) > 20
        True
    """
    asynchronous = device != "cpu" if asynchronous is None else asynchronous
    ran = 0
    for case in cases(kernel.op, torch.device(device).type):
        if case.why_not(kernel, torch.device(device).type) or (case.invariant is host_never_asked and not asynchronous):
            continue
        try:
            case.check(kernel, device, apart)
        except AssertionError as error:
            raise AssertionError(f"{case} of backend {kernel.backend}: {error}") from error
        ran += 1
    return ran


def cases(op: str, device_type: str = "cpu") -> list[Case]:
    """All cases of an op.

    Raises:
        KeyError: the table does not have the op.

    Example:
        >>> from hf_gdn.testing import cases
        >>> print(cases("chunk_gdn")[1])
        chunk_gdn-matches_reference-one_token
    """
    return list(_TABLES[op, "cpu" if device_type == "cpu" else "cuda"](op))


# --------------------------------------------------------------------------------------- calls made of other calls


def gate_none(g: Tensor, random: torch.Generator) -> Tensor:
    return torch.zeros_like(g)


def gate_all(g: Tensor, random: torch.Generator) -> Tensor:
    return torch.full_like(g, -60.0)


def gate_far_beyond(g: Tensor, random: torch.Generator) -> Tensor:
    return torch.full_like(g, -1e4)


def gate_one_token(g: Tensor, random: torch.Generator) -> Tensor:
    g[:, 2] = -60.0
    return g


def gate_minus_infinity(g: Tensor, random: torch.Generator) -> Tensor:
    g[:, 2, ..., 0] = -torch.inf
    return g


def gate_some(g: Tensor, random: torch.Generator) -> Tensor:
    """Complete forgetting at single tokens, in single channels for KDA, and no decay elsewhere."""
    return torch.where(torch.rand(g.shape, generator=random).to(g.device) < 0.03, -60.0, 0.0)


def gate_mixed(g: Tensor, random: torch.Generator) -> Tensor:
    """-60 at single tokens, small decays elsewhere, and one channel (GDN: head) that forgets everything each token."""
    mixed = torch.where(torch.rand(g.shape, generator=random).to(g.device) < 0.03, -60.0, 0.05 * g)
    mixed[..., 0] = -60.0
    return mixed


def gate_average(nats: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """A gate that decays by `nats` a token on average."""

    def gate(g: Tensor, random: torch.Generator) -> Tensor:
        return -2 * nats * torch.rand(g.shape, generator=random).to(g.device)

    gate.__name__ = f"gate_average_{nats}"
    return gate


def gated(gate: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[Call], Call]:
    """The call with the gate g that `gate` makes of it."""

    def change(call: Call) -> Call:
        return {**call, "g": gate(call["g"], torch.Generator().manual_seed(1))}

    change.__name__ = gate.__name__
    return change


def beta_up_to_two(call: Call) -> Call:
    return {**call, "beta": 2 * call["beta"]}


def beta_two_without_decay(call: Call) -> Call:
    return {**call, "beta": 2 * call["beta"], "g": torch.zeros_like(call["g"])}


def l2norm(call: Call) -> Call:
    """q and k of other lengths, to be normalised, and a token whose key is zero, as of a padded one: it stays zero."""
    k = 5 * call["k"]
    k[:, 1] = 0
    return {**call, "q": 7 * call["q"], "k": k, "qk_l2norm": True}


def equal_keys(call: Call) -> Call:
    """The worst case of a chunk's inverse: every row of it depends on all before."""
    k = call["k"][:, :1].expand_as(call["k"]).contiguous()
    return {**call, "k": k, "g": 0.01 * call["g"], "beta": torch.ones_like(call["beta"])}


def keys_of_size(size: float, beta: float) -> Callable[[Call], Call]:
    return lambda call: {**call, "k": size * call["k"], "beta": beta * call["beta"]}


def small_decay_after_large_sum(call: Call) -> Call:
    """A channel that has decayed by thousands keeps the small decays that follow."""
    g = 0.01 * call["g"]
    g[:, :48:5] = -400.0
    g[:, 64:70] = -1000.0
    return {**call, "g": g}


def in_place(call: Call) -> Call:
    return {**call, "inplace": True}


def to_normalise(call: Call) -> Call:
    return {**call, "qk_l2norm": True}


def beta_in_fp32(call: Call) -> Call:
    return {**call, "beta": call["beta"].float() + 1e-4}


def packed(*bounds: int, state: bool = True, index: torch.dtype = torch.int64) -> Callable[[Call], Call]:
    """The call with its one row cut at `bounds`, and a random initial state for each sequence."""

    def change(call: Call) -> Call:
        call = {**call, "cu_seqlens": torch.tensor(bounds, dtype=index).to(calls.tensors(call)[0].device)}
        if "keep" not in call:
            x, random = call["initial_state"], torch.Generator().manual_seed(3)
            states = 0.1 * torch.randn(len(bounds) - 1, *x.shape[1:], generator=random, dtype=x.dtype)
            call["initial_state"] = states.to(x.device) if state else None
        elif not state:
            call["conv_state"] = None
        return call

    return change


def extreme_gates(shift: float) -> Callable[[Call], Call]:
    """softplus of -18 is 1.5e-8, which log(1 + e^x) would lose; of 25 it is 25."""

    def change(call: Call) -> Call:
        x, weights = call["projected"], call["weights"]
        weights = weights._replace(A_log=torch.zeros_like(weights.A_log))
        return {**call, "projected": x._replace(a=x.a + shift, b=x.b + shift / 10), "weights": weights}

    return change


def conv_state_of(width: int) -> Callable[[Call], Call]:
    """A static cache may keep more columns than there are taps before a token; 0 for no cache, not even a new one."""

    def change(call: Call) -> Call:
        x, random = call["conv_state"], torch.Generator().manual_seed(3)
        wide = torch.randn(*x.shape[:2], width, generator=random).to(x.device, x.dtype) if width else None
        return {**call, "conv_state": wide, "keep": width}

    return change


def without_conv_state(call: Call) -> Call:
    return {**call, "conv_state": None}


def padded(*lengths: int, cache: bool = True) -> Callable[[Call], Call]:
    """The call with `lengths` tokens in its rows, and padding behind them."""

    def change(call: Call) -> Call:
        x = call["conv_state"]
        return {**call, "conv_state": x if cache else None, "lengths": torch.tensor(lengths, device=x.device)}

    return change


# -------------------------------------------------------------------------------------------------------- small calls


def _names(dtypes: Iterable[torch.dtype]) -> list[tuple[torch.dtype, str]]:
    return [(dtype, str(dtype).removeprefix("torch.")) for dtype in dtypes]


def _sizes(names: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Shapes by name as keyword arguments."""
    for name, shape in shapes.items():
        yield name, dict(zip(names.split(), shape, strict=True))


# Also for eager's slabs and GVA with three value heads to a key head; the interpreter has smaller ones beside them.
_LONGER = {  # B, T, HK, HV, K, V
    "below_a_chunk": (1, 63, 2, 4, 8, 8),
    "a_chunk": (1, 64, 2, 2, 8, 8),
    "above_a_chunk": (2, 65, 1, 3, 8, 8),
    "more_odd_dims": (1, 100, 2, 4, 24, 40),
    "more_of_olmo": (1, 70, 1, 1, 96, 192),
    "longer_than_a_slab": (1, 1000, 1, 2, 8, 8),
}


def _delta_rule(op: str) -> Iterator[Case]:
    """Of all delta rules: long calls, dtypes, and extremes."""
    for name, sizes in _sizes("B T HK HV K V", _LONGER):
        yield Case(op, name, sizes=sizes, interpret=False)
    odd: dict[str, Any] = dict(T=100, HK=2, HV=4, K=24, V=40)
    for dtype, name in _names((torch.float64, *DTYPES)):
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


def _chunk(op: str) -> Iterator[Case]:
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
    for dtype, name in _names(DTYPES):
        for gate in (gate_none, gate_some, gate_mixed, gate_all, *map(gate_average, (0.2, 2.0, 6.0))):
            yield Case(op, f"{gate.__name__}_{name}", sizes=dict(one, T=80, HV=2, dtype=dtype), change=gated(gate))
        if op == "chunk_gdn":
            for group in (1, 2, 3, 4):
                sizes = dict(one, T=66, HK=2, HV=2 * group, dtype=dtype)
                yield Case(op, f"{group}_value_heads_{name}", sizes=sizes)
        if dtype != torch.bfloat16:
            yield Case(op, f"l2norm_{name}", sizes=dict(one, T=66, HK=2, HV=4, K=20, dtype=dtype), change=l2norm)
    yield Case(op, "beta_up_to_two", sizes=dict(one, T=130, K=32), change=beta_up_to_two)
    yield Case(op, "equal_keys", sizes=dict(one, T=128), change=equal_keys)
    for name, size, beta, decay in (("large", 50.0, 4e-4, 0.2), ("small", 0.01, 1.0, 0.2), ("growing", 2.0, 1.0, 8.0)):
        sizes = dict(two, dtype=torch.bfloat16, decay=decay)
        yield Case(op, f"{name}_keys", sizes=sizes, change=keys_of_size(size, beta))
    yield Case(op, "small_decay", sizes=dict(one, T=192), change=small_decay_after_large_sum)
    for bounds in ((0, 0, 1, 1, 65, 66, 130, 130), (0, 64, 128), (0, 0)):
        for index, name in _names((torch.int32, torch.int64)):
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
    if op == "chunk_kda":
        sizes = dict(T=4096, HK=1, HV=1, K=8, V=8, decay=0.0)
        yield Case(op, "no_decay_for_thousands_of_tokens", sizes=sizes, interpret=False)
    yield from _delta_rule(op)


def _recurrent(op: str) -> Iterator[Case]:
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
    for name, sizes in _sizes("B T HK HV K V", shapes):
        yield Case(op, name, sizes=sizes)
    two, odd = dict(T=2, HK=1, HV=2, K=16, V=8), dict(T=3, HK=2, HV=4, K=24, V=40)
    for dtype, name in _names(DTYPES):
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
    for index, name in _names((torch.int32, torch.int64)):
        for state in (True, False):
            case, change = f"{name}{'' if state else '_no_state'}", packed(*bounds, state=state, index=index)
            yield Case(op, case, packed_equals_separate, nine, change)
            yield Case(op, f"packed_{case}", sizes=nine, change=change)
    yield Case(op, "larger_tensors", strided_inputs, dict(B=2, T=3, HK=1, HV=2, K=24, V=40, dtype=torch.bfloat16))
    yield from _delta_rule(op)


def _families(op: str) -> dict[str, dict[str, Any]]:
    """The specs of the families whose variant is the op's, by name, the plain one first."""
    return {name: spec for name, (variant, spec) in FAMILIES.items() if op.endswith(variant)}


def _layer(op: str, names: str, shapes: Mapping[str, tuple[int, ...]], odd: str, two: str) -> Iterator[Case]:
    """Of steps and prologues: shapes, families, and gates. KDA has as many key heads as value heads."""
    families, by_name = _families(op), dict(_sizes(names, shapes))
    first = next(iter(families.values()))
    for sizes in by_name.values():
        sizes["HK"] = sizes["HV"] if op.endswith("kda") else sizes["HK"]
    for name, sizes in by_name.items():
        yield Case(op, name, sizes={**sizes, **first})
    for family, spec in families.items():
        for dtype, name in _names(DTYPES):
            bias = "prologue" in op
            yield Case(op, f"{family}_{name}", sizes={**by_name[odd], **spec, "dtype": dtype, "bias": bias})
    for family in {"gdn": ("qwen3_next",), "kda": ("kimi_linear", "glm5_next")}[op[-3:]]:
        # A prologue returns the decay itself, which fp32 cannot hold in full at -100.
        for shift in (-60.0 if "prologue" in op else -100.0, -18.0, 25.0, 80.0):
            sizes = {**by_name[two], **families[family]}
            yield Case(op, f"{family}_gates_{shift:+.0f}", sizes=sizes, change=extreme_gates(shift))
    yield Case(op, "bias", sizes={**by_name[odd], **first, "bias": True})


def _step(op: str) -> Iterator[Case]:
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
    families, kda = _families(op), op.endswith("kda")
    first = dict(HK=2 if kda else 1, HV=2, K=8, **next(iter(families.values())))
    for cuts in ([1] * 7, [3, 4], [5, 1, 1]):
        sizes = dict(first, T=7, V=16, dtype=torch.bfloat16)
        yield Case(op, "_".join(map(str, cuts)), split_equals_whole, sizes, options=dict(sizes=cuts))
    yield Case(op, "three", batched_equals_single, dict(first, B=3, T=2, V=8))
    odd = dict(first, T=3, HK=4 if kda else 2, HV=4, K=24, V=40)
    yield Case(op, "separate", strided_inputs, odd, options=dict(layout=calls.of_separate_projections))
    yield Case(op, "odd_dims", same_bits, odd)
    yield Case(op, "odd_dims", inputs_untouched, odd)
    for family, spec in families.items():
        more = dict(B=2, HK=4 if kda else 2, HV=4, K=12, V=20, bias=True, **spec)
        for T in (1, 3):
            for width in (1, 2, 4, 8):
                sizes = dict(more, T=T, width=width)
                yield Case(op, f"{family}_{T}_tokens_width_{width}", sizes=sizes, interpret=False)
        yield Case(op, family, split_equals_whole, dict(more, T=3), options=dict(sizes=[1, 1, 1]), interpret=False)


def _prologue(op: str) -> Iterator[Case]:
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
    families, kda = _families(op), op.endswith("kda")
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
        for index, name in _names((torch.int32, torch.int64)):
            case, change, sizes = f"{len(bounds) - 1}_{name}", packed(*bounds, index=index), dict(first, T=bounds[-1])
            yield Case(op, case, packed_equals_separate, sizes, change)
            yield Case(op, f"packed_{case}", sizes=sizes, change=change)
    for at in (1, 2, 3, 5, 64, 69):
        sizes = dict(first, B=2, T=70, dtype=torch.bfloat16)
        yield Case(op, f"at_{at}", split_equals_whole, sizes, options=dict(sizes=[at, 70 - at]))
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


def _norm_spec(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a family's spec concerns the gated norm."""
    return {name: x for name, x in spec.items() if name in ("gate", "norm_in_fp32", "eps")}


def _gated_norm(op: str) -> Iterator[Case]:
    shapes = {  # B, T, HK, HV, V
        "one_row": (1, 1, 1, 1, 16),
        "more_than_a_program": (2, 67, 2, 4, 32),
        "odd_dims": (2, 3, 2, 6, 40),
        "smallest": (1, 2, 1, 3, 1),
        "wide": (1, 9, 1, 2, 192),
        "no_rows": (1, 0, 1, 2, 16),
    }
    by_name = {name: dict(sizes, K=8) for name, sizes in _sizes("B T HK HV V", shapes)}
    for name, sizes in by_name.items():
        yield Case(op, name, sizes=sizes)
    for family, (_, spec) in FAMILIES.items():
        for dtype, name in _names(DTYPES):
            sizes = {**by_name["odd_dims"], **_norm_spec(spec), "dtype": dtype}
            yield Case(op, f"{family}_{name}", sizes=sizes)
    for gate in ("silu", "sigmoid"):
        for fp32 in (False, True):
            sizes = dict(B=2, T=5, HK=2, HV=4, K=8, V=20, gate=gate, norm_in_fp32=fp32)
            yield Case(op, f"{gate}_{'fp32' if fp32 else 'dtype'}", sizes=sizes, interpret=False)
    half = {**by_name["more_than_a_program"], "dtype": torch.bfloat16}
    yield Case(op, "bfloat16", batched_equals_single, half)
    yield Case(op, "bfloat16", split_equals_whole, half, options=dict(sizes=[1, 66]))
    yield Case(op, "bfloat16", same_bits, half)
    yield Case(op, "bfloat16", inputs_untouched, half)


# ------------------------------------------------------------------------------------------------- calls of real layers


def _real(op: str, layer: str = "qwen3_next") -> dict[str, Any]:
    HK, HV, K, V = LAYERS.get(layer, LAYERS["equal_heads"])
    return dict(HK=HV if "chunk_kda" in op else HK, HV=HV, K=K, V=V)


def _real_chunk(op: str) -> Iterator[Case]:
    real, bf16 = _real(op), torch.bfloat16
    for dtype, name in _names(DTYPES):
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


def _real_recurrent(op: str) -> Iterator[Case]:
    half = {layer: dict(_real(op, layer), dtype=torch.bfloat16) for layer in LAYERS}
    for layer, sizes in half.items():
        for B in (1, 8, 32):
            for T in (1, 4, 16):
                yield Case(op, f"{layer}_{B}x{T}", sizes=dict(sizes, B=B, T=T), change=to_normalise)
    for dtype, name in _names(DTYPES):
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
    for index, name in _names((torch.int32, torch.int64)):
        change = packed(0, 5, 5, 6, 70, index=index)
        yield Case(op, name, packed_equals_separate, dict(sizes, T=70), change)
        yield Case(op, f"packed_{name}", sizes=dict(sizes, T=70), change=change)
    # 70,000 heads; grid y and z end at 65,535.
    yield Case(op, "70000_heads", sizes=dict(B=70_000, T=1, HK=1, HV=1, K=8, V=8, dtype=torch.bfloat16))


def _real_layers(op: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Families with the op's variant: name, sizes of their layers, spec."""
    for name, spec in _families(op).items():
        yield name, _real(op, name), spec


def _real_step(op: str) -> Iterator[Case]:
    for family, sizes, spec in _real_layers(op):
        if family in ("qwen3_next", "olmo_hybrid", "kimi_linear"):
            for B in (1, 8, 32):
                for T in (1, 4, 16):
                    half = dict(sizes, B=B, T=T, dtype=torch.bfloat16, **spec)
                    yield Case(op, f"{family}_{B}x{T}", sizes=half)
        for dtype, name in _names(DTYPES):
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


def _real_prologue(op: str) -> Iterator[Case]:
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
        for dtype, name in _names(DTYPES):
            yield Case(op, f"{family}_{name}", sizes=dict(sizes, B=2, T=70, dtype=dtype, bias=True, **spec))
    _, sizes, spec = next(_real_layers(op))
    for width in (1, 2, 3, 8):
        half = dict(sizes, B=2, T=70, width=width, dtype=torch.bfloat16, **spec)
        yield Case(op, f"width_{width}", sizes=half)


def _real_gated_norm(op: str) -> Iterator[Case]:
    for family in ("qwen3_next", "olmo_hybrid", "kimi_linear"):
        for dtype, name in _names(DTYPES):
            sizes = dict(_real(op, family), B=3, T=100, dtype=dtype, **_norm_spec(FAMILIES[family][1]))
            yield Case(op, f"{family}_{name}", sizes=sizes)


_TABLES: dict[tuple[str, str], Callable[[str], Iterator[Case]]] = {
    (f"{kind}_{variant}", device): table
    for kind, tables in {
        "chunk": (_chunk, _real_chunk),
        "recurrent": (_recurrent, _real_recurrent),
        "step": (_step, _real_step),
        "prologue": (_prologue, _real_prologue),
    }.items()
    for variant in ("gdn", "kda")
    for device, table in zip(("cpu", "cuda"), tables)
}
_TABLES["gated_norm", "cpu"], _TABLES["gated_norm", "cuda"] = _gated_norm, _real_gated_norm
