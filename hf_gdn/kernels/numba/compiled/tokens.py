"""The delta rule for one value head and a block of tokens, on some columns of the state at a time.

Per column of S, with d = exp g and the state S before a token:

    u = beta (v - (d k)^T S) ;  o = scale ((d q)^T S + (k . q) u) ;  S <- d S + k u^T

The two products with S are taken while the previous token's update is written, so S passes through the processor once
a token. Columns are independent; `LANES` of them are copied to scratch memory, where they stay for the whole block: in
the state, their rows are far apart, which caches do not like.
"""

from __future__ import annotations

from .lanes import LANES, at, fma, load, splat, store
from .memory import jit


@jit
def _read_columns(S, columns, width, K, P):
    """Columns of S ``[K, width]`` from `columns` on, to P ``[K, LANES]``, with zeros where S ends."""
    if columns + LANES <= width:
        for k in range(K):
            store(P, k * LANES, load(S, k * width + columns))
        return
    for k in range(K):
        store(P, k * LANES, splat(P, 0.0))
        for i in range(width - columns):
            P[k * LANES + i] = S[k * width + columns + i]


@jit
def _write_columns(P, K, S, columns, width):
    if columns + LANES <= width:
        for k in range(K):
            store(S, k * width + columns, load(P, k * LANES))
        return
    for k in range(K):
        for i in range(width - columns):
            S[k * width + columns + i] = P[k * LANES + i]


@jit
def delta_rule(S, final, has_state, states, has_states, stride, T, K, V, k, dk, dq, d, kq, beta, v, o, scale, P):
    """Process T tokens, T >= 1. Rows of k, dk = d k, dq = d q and d ``[T, K]``, of v and o ``[T, V]`` are padded.

    Args:
        S: the state before, ``[K, V]``; it is not read without `has_state`.
        final: the state after; may be S.
        states: receives the state after every token, `stride` numbers apart, if `has_states`.
        kq, beta: ``[T]``.
        P: scratch memory for ``[K, LANES]``.
    """
    KP, VP = (K + LANES - 1) // LANES * LANES, (V + LANES - 1) // LANES * LANES
    for c in range(0, V, LANES):
        a, b = splat(P, 0.0), splat(P, 0.0)
        if not has_state:
            for i in range(K):
                store(P, i * LANES, a)
        elif c + LANES <= V:
            for i in range(K):
                s = load(S, i * V + c)
                store(P, i * LANES, s)
                a = fma(dk[i], s, a)
                b = fma(dq[i], s, b)
        else:
            _read_columns(S, c, V, K, P)
            for i in range(K):
                s = load(P, i * LANES)
                a = fma(dk[i], s, a)
                b = fma(dq[i], s, b)
        for t in range(T):
            u = (load(v, t * VP + c) - a) * beta[t]
            store(o, t * VP + c, fma(kq[t], u, b) * scale)
            row = t * KP
            if t + 1 < T:
                a, b = splat(P, 0.0), splat(P, 0.0)
                for i in range(K):
                    s = fma(k[row + i], u, load(P, i * LANES) * d[row + i])
                    store(P, i * LANES, s)
                    a = fma(dk[row + KP + i], s, a)
                    b = fma(dq[row + KP + i], s, b)
            elif c + LANES <= V:
                for i in range(K):
                    s = fma(k[row + i], u, load(P, i * LANES) * d[row + i])
                    store(final, i * V + c, s)
                    if has_states:
                        store(P, i * LANES, s)
            else:
                for i in range(K):
                    store(P, i * LANES, fma(k[row + i], u, load(P, i * LANES) * d[row + i]))
                _write_columns(P, K, final, c, V)
            if has_states:
                _write_columns(P, K, at(states, t * stride), c, V)
