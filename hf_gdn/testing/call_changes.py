"""Calls made of other calls: hard gates, keys that resemble each other, packed and padded rows, other caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import calls
from .calls import Call


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


def gate_one_far_beyond(g: Tensor, random: torch.Generator) -> Tensor:
    """A sum of such a gate and others, even in float64, is that gate."""
    g[:, 2] = -1e30
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


def equal_keys_beta_two(call: Call) -> Call:
    return {**equal_keys(call), "beta": torch.full_like(call["beta"], 2.0)}


def some_zero(call: Call) -> Call:
    """Keys of zero, as of padded tokens, and others with a beta of zero."""
    k, beta = call["k"].clone(), call["beta"].clone()
    k[:, ::5] = 0
    beta[:, 1::3] = 0
    return {**call, "k": k, "beta": beta}


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
        if "initial_state" in call:
            x, random = call["initial_state"], torch.Generator().manual_seed(3)
            states = 0.1 * torch.randn(len(bounds) - 1, *x.shape[1:], generator=random, dtype=x.dtype)
            call["initial_state"] = states.to(x.device) if state else None
            if "d_final_state" in call:
                call["d_final_state"] = states.flip(0).to(x.device)
        elif "conv_state" in call and not state:
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
        made = {**call, "lengths": torch.tensor(lengths, device=call["projected"].q.device)}
        return made if cache or "conv_state" not in call else {**made, "conv_state": None}

    return change


def zero_rows(call: Call) -> Call:
    """A gated norm's call with rows of zeros, as of padded tokens."""
    o = call["o"].clone()
    o[:, ::2] = 0
    return {**call, "o": o}


def far_gates(call: Call) -> Call:
    """A gated norm's call with gates that are shut or wide open."""
    z = call["z"].clone()
    z[..., 0, :] -= 80.0
    z[..., -1, 1:] += 80.0
    return {**call, "z": z}


def zero_tokens(call: Call) -> Call:
    """A prologue's call with tokens of zeros, as padded ones are."""

    def cleared(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 3::2] = 0
        return x

    return {**call, "projected": calls.mapped(cleared, call["projected"])}
