"""The compiled part of `hf_gdn.kernels.numba.prologue`: a task is some tokens of a key head, with its value heads."""

from __future__ import annotations

from numba import types

from ..arguments import BLOCK, PROLOGUE_BLOCK
from .entry import arguments, next_task, scratch_of_thread
from .lanes import LANES, at, pointer
from .math import l2norm, writing_strength
from .memory import copy_bytes, jit, size_of, write_row, zero_bytes, zero_row
from .projections import convolve_tokens, decay_bias, read_context, read_decay, read_weights, slot_of


@jit
def _last_inputs(x, n, slot, with_state, channel, channels, D, address, stride, start, end):
    """Write the convolution state of D channels after the tokens of sequence n, `start` to `end`, to `recent`."""
    size, keep = size_of(x.recent_dtype), x.keep
    for i in range(D):
        row = (channel + i) * keep * size
        for j in range(keep):
            at_token = end - keep + j
            target = x.recent + n * channels * keep * size + row + j * size
            if at_token >= start:
                copy_bytes(address + at_token * stride + i * size, target, size)
            elif with_state and at_token - start + keep >= 0:
                copy_bytes(x.conv_state + slot * x.conv_state_b + row + (at_token - start + keep) * size, target, size)
            else:
                zero_bytes(target, size)


@jit
def _last_inputs_of_packed(x, channel, channels, D, address, stride, first, last):
    """The same for every packed sequence whose last token is one of those from `first` to `last`."""
    bounds = pointer(x.bounds, types.int64)
    n = 0
    while bounds[n + 1] <= first:
        n += 1
    while bounds[n] < last:
        if first < bounds[n + 1] <= last and bounds[n] < bounds[n + 1]:
            slot, has_begun = slot_of(x, n, False)
            _last_inputs(x, n, slot, has_begun, channel, channels, D, address, stride, bounds[n], bounds[n + 1])
        if bounds[n + 1] >= last:
            break
        n += 1


@jit
def _end_of_run(x, bounds, first, last):
    """The sequence of the token `first`, where its run ends, and how many taps its first token has without a state."""
    if x.bounds == 0:
        return 0, last, x.width
    n = 0
    while bounds[n + 1] <= first:
        n += 1
    return n, min(bounds[n + 1], last), min(first - bounds[n] + 1, x.width)


@jit
def _convolve_head(x, n, channel, D, address, dtype, stride, first, last, weights, bias, rows, room, out):
    """silu of the convolution at tokens from `first` to `last` of a head: ``[last - first, D]``, rows padded."""
    DP = (D + LANES - 1) // LANES * LANES
    read_weights(x, channel, D, weights, bias, room)
    with_state = x.conv_state != 0 and x.bounds == 0
    read_context(x, n, channel, D, address, dtype, stride, 0, first, with_state, rows)
    bounds = pointer(x.bounds, types.int64)
    t = first
    while t < last:
        sequence, end, taps = _end_of_run(x, bounds, t, min(last, t + BLOCK))
        if x.slots != 0:
            if t == first or t == bounds[sequence]:
                slot, has_begun = slot_of(x, sequence, False)
                begin = bounds[sequence]
                read_context(x, slot, channel, D, address, dtype, stride, begin, t, has_begun, rows)
            taps = x.width
        place = at(out, (t - first) * DP)
        convolve_tokens(address + t * stride, dtype, stride, end - t, taps, x.width, D, weights, bias, rows, place)
        t = end


def prologue(block):
    x, scratch, task = arguments(block), scratch_of_thread(block), next_task(block)
    K, V, T, R, width, HV = x.K, x.V, x.T, x.R, x.width, x.HK * x.R
    KP, VP = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
    D = max(KP, VP)
    channels = 2 * x.HK * K + HV * V
    weights, bias = scratch, at(scratch, width * D)
    rows = at(bias, D)
    room = at(rows, (width - 1 + BLOCK) * D)
    out = at(room, width * D + LANES)
    g = at(out, PROLOGUE_BLOCK * D)
    decay_bias_of_head = at(g, KP)
    one = at(decay_bias_of_head, KP)
    size = size_of(x.out_q_dtype)
    while task < x.tasks:
        # Tasks of the same tokens follow each other: their inputs are in the same rows of memory.
        i_k, part = task % x.HK, task // x.HK
        n, first = part // x.blocks, part % x.blocks * PROLOGUE_BLOCK
        last = min(first + PROLOGUE_BLOCK, T)
        length = T if x.lengths == 0 else pointer(x.lengths, types.int64)[n]
        for is_k in range(2):
            channel = (is_k * x.HK + i_k) * K
            if is_k == 0:
                address, dtype, stride, target = x.q + n * x.q_b + i_k * x.q_h, x.q_dtype, x.q_t, x.out_q
            else:
                address, dtype, stride, target = x.k + n * x.k_b + i_k * x.k_h, x.k_dtype, x.k_t, x.out_k
            _convolve_head(x, n, channel, K, address, dtype, stride, first, last, weights, bias, rows, room, out)
            for t in range(first, last):
                row = at(out, (t - first) * KP)
                l2norm(row, K)
                write_row(row, target + ((n * T + t) * x.HK + i_k) * K * size, x.out_q_dtype, K, room)
            if x.slots != 0:
                _last_inputs_of_packed(x, channel, channels, K, address, stride, first, last)
            elif first == 0 and x.recent != 0:
                _last_inputs(x, n, n, x.conv_state != 0, channel, channels, K, address, stride, 0, length)
        for r in range(R):
            h = i_k * R + r
            channel, address = 2 * x.HK * K + h * V, x.v + n * x.v_b + i_k * x.v_h + r * x.v_r
            _convolve_head(x, n, channel, V, address, x.v_dtype, x.v_t, first, last, weights, bias, rows, room, out)
            if x.slots != 0:
                _last_inputs_of_packed(x, channel, channels, V, address, x.v_t, first, last)
            elif first == 0 and x.recent != 0:
                _last_inputs(x, n, n, x.conv_state != 0, channel, channels, V, address, x.v_t, 0, length)
            rate = decay_bias(x, h, decay_bias_of_head)
            a, b = x.a + n * x.a_b + i_k * x.a_h + r * x.a_r, x.b + n * x.b_b + i_k * x.b_h + r * x.b_r
            for t in range(first, last):
                token = (n * T + t) * HV + h
                write_row(at(out, (t - first) * VP), x.out_v + token * V * size, x.out_v_dtype, V, room)
                numbers = K if x.is_kda else 1
                if t < length:
                    read_decay(x, a + t * x.a_t, rate, decay_bias_of_head, g)
                    one[0] = writing_strength(one, b + t * x.b_t, x.b_dtype, x.beta_scale)
                else:
                    zero_row(g, numbers)
                    one[0] = 0.0
                write_row(g, x.out_g + token * numbers * size_of(x.out_g_dtype), x.out_g_dtype, numbers, room)
                write_row(one, x.out_beta + token * size_of(x.out_beta_dtype), x.out_beta_dtype, 1, room)
        task = next_task(block)
