"""The compiled part of `hf_gdn.kernels.numba.step`: a task is a key head of a sequence, with its value heads."""

from __future__ import annotations

from ..arguments import BLOCK
from .entry import arguments, next_task, scratch_of_thread
from .lanes import LANES, at, load, pointer_like, store
from .math import dot, l2norm, multiply_by_decay, norm_and_gate, writing_strength
from .memory import jit, move_bytes, read_row, rounded_to, size_of, write_column, write_row, zero_bytes
from .projections import (
    convolve_tokens,
    decay_bias,
    read_context,
    read_decay,
    read_weights,
    slot_of,
)
from .tokens import delta_rule


@jit
def _round_rows(rows, n, dtype):
    for i in range(0, n, LANES):
        store(rows, i, rounded_to(dtype, load(rows, i)))


@jit
def _shift_conv_state(x, slot, has_begun, channel, D, address, stride):
    """Shift the convolution state of D channels by T tokens, in place; the tokens are at `address`, stride apart."""
    size, keep, T = size_of(x.conv_state_dtype), x.keep, x.T
    state = x.conv_state + slot * x.conv_state_b + channel * keep * size
    if not has_begun:
        zero_bytes(state, D * keep * size)
    elif keep > T:  # all channels at once: what comes from the next channel is replaced below
        move_bytes(state + T * size, state, (D * keep - T) * size)
    for j in range(max(keep - T, 0), keep):
        write_column(address + (T - keep + j) * stride, state + j * size, keep, size, D)


def step(block):
    x, scratch, task = arguments(block), scratch_of_thread(block), next_task(block)
    while task < x.tasks:
        K, V, T, R, width = x.K, x.V, x.T, x.R, x.width
        KP, VP = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
        D = max(KP, VP)
        n, i_k = task // x.HK, task % x.HK
        HV = x.HK * R
        slot, has_begun = slot_of(x, n, True)
        before = width - 1

        # Scratch memory: P, room for conversions, then what belongs to q, k and each value head.
        P = scratch
        room = at(P, KP * LANES)
        o = at(room, D * width + LANES)
        g = at(o, BLOCK * VP)
        norm, z = at(g, KP), at(g, KP + VP)
        q = at(z, VP)
        k, d, dk, dq = at(q, BLOCK * KP), at(q, 2 * BLOCK * KP), at(q, 3 * BLOCK * KP), at(q, 4 * BLOCK * KP)
        v = at(q, 5 * BLOCK * KP)
        kq, beta = at(v, BLOCK * VP), at(v, BLOCK * VP + BLOCK)
        weights_q = at(beta, BLOCK)
        weights_k = at(weights_q, width * KP)
        bias_q, bias_k = at(weights_k, width * KP), at(weights_k, width * KP + KP)
        rows_q = at(bias_k, KP)
        rows_k = at(rows_q, (before + BLOCK) * KP)
        heads = at(rows_k, (before + BLOCK) * KP)
        per_head = width * VP + VP + (before + BLOCK) * VP + KP + LANES

        channel_q, channel_k, channel_v = i_k * K, (x.HK + i_k) * K, 2 * x.HK * K + i_k * R * V
        x_q, x_k = x.q + n * x.q_b + i_k * x.q_h, x.k + n * x.k_b + i_k * x.k_h
        x_v = x.v + n * x.v_b + i_k * x.v_h
        read_weights(x, channel_q, K, weights_q, bias_q, room)
        read_weights(x, channel_k, K, weights_k, bias_k, room)
        read_context(x, slot, channel_q, K, x_q, x.q_dtype, x.q_t, 0, 0, has_begun, rows_q)
        read_context(x, slot, channel_k, K, x_k, x.k_dtype, x.k_t, 0, 0, has_begun, rows_k)
        read_row(x.norm, x.norm_dtype, V, norm)
        for r in range(R):
            head, channel = at(heads, r * per_head), channel_v + r * V
            read_weights(x, channel, V, head, at(head, width * VP), room)
            read_context(
                x, slot, channel, V, x_v + r * x.v_r, x.v_dtype, x.v_t, 0, 0, has_begun, at(head, (width + 1) * VP)
            )
            tail = at(head, (width + 1 + before + BLOCK) * VP)
            tail[0] = decay_bias(x, i_k * R + r, at(tail, LANES))

        size = size_of(x.y_dtype)
        for start in range(0, T, BLOCK):
            count = min(BLOCK, T - start)
            convolve_tokens(x_q + start * x.q_t, x.q_dtype, x.q_t, count, width, width, K, weights_q, bias_q, rows_q, q)
            convolve_tokens(x_k + start * x.k_t, x.k_dtype, x.k_t, count, width, width, K, weights_k, bias_k, rows_k, k)
            _round_rows(q, count * KP, x.q_dtype)
            _round_rows(k, count * KP, x.k_dtype)
            for t in range(count):
                l2norm(at(q, t * KP), K)
                l2norm(at(k, t * KP), K)
                kq[t] = dot(at(k, t * KP), at(q, t * KP), K)
            for r in range(R):
                h = i_k * R + r
                head = at(heads, r * per_head)
                tail = at(head, (width + 1 + before + BLOCK) * VP)
                x_r = x_v + start * x.v_t + r * x.v_r
                bias, rows = at(head, width * VP), at(head, (width + 1) * VP)
                convolve_tokens(x_r, x.v_dtype, x.v_t, count, width, width, V, head, bias, rows, v)
                _round_rows(v, count * VP, x.v_dtype)
                for t in range(count):
                    token = start + t
                    a = x.a + n * x.a_b + token * x.a_t + i_k * x.a_h + r * x.a_r
                    read_decay(x, a, tail[0], at(tail, LANES), g)
                    row = t * KP
                    multiply_by_decay(x.is_kda, g, at(k, row), at(q, row), K, at(d, row), at(dk, row), at(dq, row))
                    b = x.b + n * x.b_b + token * x.b_t + i_k * x.b_h + r * x.b_r
                    beta[t] = writing_strength(g, b, x.b_dtype, x.beta_scale)
                S = at(pointer_like(x.state + slot * x.state_b, P), h * K * V)
                delta_rule(
                    S, S, has_begun or start > 0, S, False, 0, count, K, V, k, dk, dq, d, kq, beta, v, o, x.scale, P
                )
                _round_rows(o, count * VP, x.y_dtype)
                for t in range(count):
                    token = start + t
                    read_row(x.z + n * x.z_b + token * x.z_t + i_k * x.z_h + r * x.z_r, x.z_dtype, V, z)
                    y = at(o, t * VP)
                    norm_and_gate(y, z, norm, V, x.eps, x.y_dtype, x.norm_in_fp32, x.gate_is_silu)
                    write_row(y, x.y + (((n * T + token) * HV + h) * V) * size, x.y_dtype, V, room)

        _shift_conv_state(x, slot, has_begun, channel_q, K, x_q, x.q_t)
        _shift_conv_state(x, slot, has_begun, channel_k, K, x_k, x.k_t)
        for r in range(R):
            _shift_conv_state(x, slot, has_begun, channel_v + r * V, V, x_v + r * x.v_r, x.v_t)
        task = next_task(block)
