"""The compiled part of `hf_gdn.kernels.numba.recurrent`: a task is a value head of a sequence."""

from __future__ import annotations

from numba import types

from ..arguments import BLOCK
from .entry import arguments, next_task, scratch_of_thread
from .lanes import LANES, at, is_single, pointer, pointer_like
from .math import dot, l2norm, multiply_by_decay
from .memory import read_one, read_row, size_of, write_row
from .projections import slot_of
from .tokens import delta_rule


def recurrent(block):
    x, scratch, task = arguments(block), scratch_of_thread(block), next_task(block)
    while task < x.tasks:
        K, V, HV = x.K, x.V, x.HV
        KP, VP = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
        n, h = task // HV, task % HV
        i_k = h // (HV // x.HK)
        if x.bounds != 0:
            bounds = pointer(x.bounds, types.int64)
            row, begin, end = 0, bounds[n], bounds[n + 1]
        else:
            row, begin, end = n, 0, x.T

        P = scratch
        q, k = at(P, KP * LANES), at(P, KP * LANES + BLOCK * KP)
        d, dk, dq = at(k, BLOCK * KP), at(k, 2 * BLOCK * KP), at(k, 3 * BLOCK * KP)
        v, o = at(k, 4 * BLOCK * KP), at(k, 4 * BLOCK * KP + BLOCK * VP)
        g, kq = at(o, BLOCK * VP), at(o, BLOCK * VP + KP)
        beta, room = at(kq, BLOCK), at(kq, 2 * BLOCK)

        slot, has_begun = slot_of(x, n, x.initial != 0)
        final = at(pointer_like(x.final + slot * x.final_b, P), h * K * V)
        S = final if x.initial == 0 else at(pointer_like(x.initial + slot * x.initial_b, P), h * K * V)
        if begin == end and x.initial != x.final:
            for i in range(K * V):
                final[i] = S[i] if x.initial != 0 else 0.0
        for start in range(begin, end, BLOCK):
            count = min(BLOCK, end - start)
            for t in range(count):
                token = start + t
                q_t, k_t = at(q, t * KP), at(k, t * KP)
                read_row(x.q + row * x.q_b + token * x.q_t + i_k * x.q_h, x.q_dtype, K, q_t)
                read_row(x.k + row * x.k_b + token * x.k_t + i_k * x.k_h, x.k_dtype, K, k_t)
                read_row(x.v + row * x.v_b + token * x.v_t + h * x.v_h, x.v_dtype, V, at(v, t * VP))
                if x.qk_l2norm:
                    l2norm(q_t, K)
                    l2norm(k_t, K)
                kq[t] = dot(k_t, q_t, K)
                address = x.g + row * x.g_b + token * x.g_t + h * x.g_h
                if x.is_kda:
                    read_row(address, x.g_dtype, K, g)
                else:
                    g[0] = read_one(address, x.g_dtype, g)
                multiply_by_decay(x.is_kda, g, k_t, q_t, K, at(d, t * KP), at(dk, t * KP), at(dq, t * KP))
                beta[t] = read_one(x.beta + row * x.beta_b + token * x.beta_t + h * x.beta_h, x.beta_dtype, beta)
            has_state = has_begun or start > begin
            states = pointer_like(x.states + row * x.states_b + start * x.states_t + h * x.states_h, P)
            stride = x.states_t // (4 if is_single(P) else 8)
            delta_rule(
                S,
                final,
                has_state,
                states,
                x.states != 0,
                stride,
                count,
                K,
                V,
                k,
                dk,
                dq,
                d,
                kq,
                beta,
                v,
                o,
                x.scale,
                P,
            )
            S = final
            for t in range(count):
                place = x.o + (((row * x.T + start + t) * HV + h) * V) * size_of(x.o_dtype)
                write_row(at(o, t * VP), place, x.o_dtype, V, room)
        task = next_task(block)
