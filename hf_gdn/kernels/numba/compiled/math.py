"""Functions of lanes: exponential, gates, norms and the convolution. fp32 results are within 2 units of the last place.

The exponential of fp32 is 2^n e^r with n = round(x / log 2) and |r| <= log(2) / 2, and e^r a Taylor polynomial whose
remainder is 5e-9; log(1 + e) is 2 artanh(e / (2 + e)). In float64, the C library's exponential.
"""

from __future__ import annotations

import numpy
from numba import types
from numba.extending import overload

from .lanes import LANES, exp64, first, fma, is_single, load, splat, sqrt, store, times_power_of_two, total, where_less
from .memory import jit, read_one, rounded_to

_ROUND = 12582912.0  # 1.5 2^23: adding it rounds an fp32 number to an integer, in the last bits of the sum
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


@jit
def _exp32(x):
    x = where_less(x, -104.0, -104.0, where_less(88.8, x, 88.8, x))
    shifted = fma(x, _LOG2E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, -_LN2_LOW, fma(n, -_LN2_HIGH, x))
    y = fma(r, 1 / 5040, 1 / 720)
    y = fma(y, r, 1 / 120)
    y = fma(y, r, 1 / 24)
    y = fma(y, r, 1 / 6)
    y = fma(y, r, 0.5)
    y = fma(y, r, 1.0)
    y = fma(y, r, 1.0)
    return times_power_of_two(y, shifted)


def exp(x):
    """e^x of lanes."""
    return numpy.exp(x)


@overload(exp)
def _exp(x):
    return (lambda x: _exp32(x)) if x.dtype == types.float32 else (lambda x: exp64(x))


@jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(0.0 - x))


@jit
def softplus(p, x):
    """log(1 + e^x) as max(x, 0) + log(1 + e^-|x|)."""
    e = exp(where_less(0.0, x, 0.0 - x, x))
    s = e / (2.0 + e)
    square = s * s
    y = splat(p, 0.0)
    for i in range(8 if is_single(p) else 17, -1, -1):
        y = fma(y, square, 1.0 / (2 * i + 1))
    return fma(2.0 * s, y, where_less(0.0, x, x, 0.0))


@jit
def dot(x, y, n):
    """Sum of x y over n numbers, padded with zeros; always in the same order."""
    z = load(x, 0) * load(y, 0)
    for i in range(LANES, n, LANES):
        z = fma(load(x, i), load(y, i), z)
    return total(z)


@jit
def l2norm(x, n):
    """x <- x / sqrt(sum x^2 + 1e-6), in place."""
    factor = first(1.0 / sqrt(splat(x, dot(x, x, n) + 1e-6)))
    for i in range(0, n, LANES):
        store(x, i, load(x, i) * factor)


@jit
def log_decay(p, x, rate, lower_bound, has_lower_bound, dtype):
    """g from x = a + dt_bias and rate = exp(A_log), rounded to the dtype."""
    if has_lower_bound:
        return rounded_to(dtype, lower_bound * sigmoid(rate * x))
    return rounded_to(dtype, (0.0 - rate) * softplus(p, x))


@jit
def multiply_by_decay(is_kda, g, k, q, K, d, dk, dq):
    """d = exp g, d k and d q, each ``[K]``, padded."""
    if is_kda:
        for i in range(0, K, LANES):
            y = exp(load(g, i))
            store(d, i, y)
            store(dk, i, y * load(k, i))
            store(dq, i, y * load(q, i))
    else:
        y = splat(g, first(exp(splat(g, g[0]))))
        for i in range(0, K, LANES):
            store(d, i, y)
            store(dk, i, y * load(k, i))
            store(dq, i, y * load(q, i))


@jit
def exp_of(p, address, dtype):
    """e^x of one number x at an address."""
    return first(exp(splat(p, read_one(address, dtype, p))))


@jit
def writing_strength(p, address, dtype, beta_scale):
    """beta from one output of the projection; the sigmoid is rounded as in the model."""
    return beta_scale * first(rounded_to(dtype, sigmoid(splat(p, read_one(address, dtype, p)))))


@jit
def convolve(x, taps, weights, bias, n, y):
    """y <- silu(sum over taps of x weights + bias); the oldest tap is `taps` - 1 rows before x.

    Rows of x and weights are `stride` = n rounded up to `LANES` apart; weights[w] belongs to the tap w - width + 1.
    """
    stride = (n + LANES - 1) // LANES * LANES
    for i in range(0, stride, LANES):
        z = splat(x, 0.0)
        for back in range(taps - 1, -1, -1):
            z = fma(load(x, i - back * stride), load(weights, i - back * stride), z)
        z = z + load(bias, i)
        store(y, i, z * sigmoid(z))


@jit
def norm_and_gate(o, z, weight, n, eps, dtype, norm_in_fp32, gate_is_silu):
    """o <- norm(o) gate(z), in place: RMS norm with `weight`, rounded as in the model."""
    factor = first(1.0 / sqrt(splat(o, dot(o, o, n) / n + eps)))
    for i in range(0, n, LANES):
        x = load(o, i) * factor
        if not norm_in_fp32:  # round before and after applying the weight
            x = rounded_to(dtype, x)
        x = x * load(weight, i)
        if not norm_in_fp32:
            x = rounded_to(dtype, x)
        gate = sigmoid(load(z, i))
        if gate_is_silu:
            gate = gate * load(z, i)
        store(o, i, x * gate)
