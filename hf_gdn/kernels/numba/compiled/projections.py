"""Read a layer's projections in compiled functions: the convolution of a head's channels, and the gates."""

from __future__ import annotations

from numba import types

from .lanes import LANES, at, first, load, pointer, splat, store
from .math import convolve, exp_of, log_decay
from .memory import copy_row, jit, read_one, read_row, size_of, zero_row


@jit
def slot_of(x, n, has_states):
    """The row of a sequence's states, and whether it has a state there; `has_states` if rows are not slots."""
    if x.slots == 0:
        return n, has_states
    return pointer(x.slots, types.int64)[n], pointer(x.begun, types.int8)[n] != 0


@jit
def read_weights(x, channel, D, weights, bias, room):
    """Weights and bias of the channels of a head of D channels, for `convolve`.

    Args:
        x: arguments of the call.
        channel: the first channel.
        weights: ``[width, D]``, rows padded; receives them.
        bias: ``[D]``, padded.
        room: scratch memory for ``D width`` numbers.
    """
    DP, size, width = (D + LANES - 1) // LANES * LANES, size_of(x.conv_dtype), x.width
    read_row(x.conv + channel * width * size, x.conv_dtype, D * width, room)
    for w in range(width):
        if D < DP:
            store(weights, w * DP + DP - LANES, splat(weights, 0.0))
        for i in range(D):
            weights[w * DP + i] = room[i * width + w]
    if x.conv_bias == 0:
        zero_row(bias, D)
    else:
        read_row(x.conv_bias + channel * size_of(x.conv_bias_dtype), x.conv_bias_dtype, D, bias)


@jit
def read_context(x, row_of_state, channel, D, address, dtype, stride, start, token, with_state, rows):
    """The last inputs of the convolution before a token: of earlier tokens, of conv_state before these, or zeros.

    Args:
        row_of_state: row of conv_state.
        channel: the head's first channel.
        address, dtype, stride: of the channels of token 0, and the distance of tokens in bytes.
        start: the first token of the sequence that conv_state belongs to.
        with_state: whether there is a conv_state that belongs to these tokens.
        rows: ``[width - 1, D]``, rows padded; receives them, oldest first.
    """
    DP, before = (D + LANES - 1) // LANES * LANES, x.width - 1
    for w in range(before):
        row, at_token = at(rows, w * DP), token - before + w
        column = x.keep + at_token - start
        if at_token >= start:
            read_row(address + at_token * stride, dtype, D, row)
        elif with_state and column >= 0:
            size = size_of(x.conv_state_dtype)
            place = x.conv_state + row_of_state * x.conv_state_b + (channel * x.keep + column) * size
            zero_row(row, D)
            for i in range(D):
                row[i] = read_one(place + i * x.keep * size, x.conv_state_dtype, rows)
        else:
            zero_row(row, D)


@jit
def convolve_tokens(address, dtype, stride, T, taps, width, D, weights, bias, rows, out):
    """silu of the convolution at T tokens of a head's channels: ``[T, D]``, rows padded.

    Args:
        address, dtype, stride: of the first token's channels, and the distance of tokens in bytes.
        taps: how many taps the first token has; each later one has one more, up to `width`.
        rows: ``[width - 1 + T, D]``, rows padded; its first rows are the inputs before the tokens, and are replaced by
            the last inputs.
    """
    DP = (D + LANES - 1) // LANES * LANES
    last = at(weights, (width - 1) * DP)
    for t in range(T):
        row = at(rows, (width - 1 + t) * DP)
        read_row(address + t * stride, dtype, D, row)
        convolve(row, min(taps + t, width), last, bias, D, at(out, t * DP))
    for w in range(width - 1):
        copy_row(at(rows, (T + w) * DP), at(rows, w * DP), D)


@jit
def decay_bias(x, h, bias):
    """dt_bias of value head h, ``[K]`` padded (KDA), or its first number (GDN). Returns exp(A_log)."""
    size = size_of(x.dt_bias_dtype)
    if x.is_kda:
        read_row(x.dt_bias + h * x.K * size, x.dt_bias_dtype, x.K, bias)
    else:
        bias[0] = read_one(x.dt_bias + h * size, x.dt_bias_dtype, bias)
    return exp_of(bias, x.A_log + h * size_of(x.A_log_dtype), x.A_log_dtype)


@jit
def read_decay(x, address, rate, bias, g):
    """Log-decay of a token and value head: ``[K]`` padded (KDA), or one number (GDN)."""
    if x.is_kda:
        read_row(address, x.a_dtype, x.K, g)
        for i in range(0, x.K, LANES):
            a = load(g, i) + load(bias, i)
            store(g, i, log_decay(g, a, rate, x.lower_bound, x.has_lower_bound, x.decay_dtype))
    else:
        a = splat(g, read_one(address, x.a_dtype, g) + bias[0])
        g[0] = first(log_decay(g, a, rate, x.lower_bound, x.has_lower_bound, x.decay_dtype))
