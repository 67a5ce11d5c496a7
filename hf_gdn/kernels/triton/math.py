"""Math shared by the Triton kernels: products, sums, norms, gates and the convolution."""

from __future__ import annotations

import torch

from .runtime import INTERPRET, tl, triton

_INTERPRETED = tl.constexpr(INTERPRET)
LOG2E = tl.constexpr(1.4426950408889634)  # for exp2, which is one instruction; exp takes several


def input_precision(dtype: torch.dtype) -> str | None:
    """Precision of products of fp32 operands: exact ("ieee") for fp32 inputs, else the tensor cores' default."""
    return "ieee" if dtype == torch.float32 else None


@triton.jit
def dot(b_x, b_y, b_acc=None, PRECISION: tl.constexpr = None):
    """b_acc + b_x @ b_y in fp32."""
    if _INTERPRETED:  # the interpreter would treat bf16 operands as integers
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_acc, input_precision=PRECISION)


@triton.jit
def only_if(m, condition):
    """The mask m if a scalar condition holds, else all false. `m & condition` is not boolean in the interpreter, and
    Triton 3.9 requires boolean masks."""
    return tl.where(condition, m, False)


@triton.jit
def sum_rows(b_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over the first dimension in a fixed order; the order of tl.sum depends on warps and tile size."""
    b_x = tl.reshape(b_x, [ROWS, COLUMNS])
    for i in tl.static_range(8):  # up to 256 rows
        if ROWS >> (i + 1) > 0:
            # Add the far half first: its rows are in the same thread, those of the last steps in neighbouring threads.
            b_x = tl.sum(tl.reshape(b_x, [2, ROWS >> (i + 1), COLUMNS]), 0)
    return tl.reshape(b_x, [COLUMNS])


@triton.jit
def l2norm(b_x, BK: tl.constexpr):
    """L2-normalise one row of BK elements; it is summed by `sum_rows`."""
    return b_x * tl.rsqrt(sum_rows(b_x * b_x, BK, 1) + 1e-6)


@triton.jit
def l2norm_rows(b_x):
    """L2-normalise rows."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) + 1e-6)[:, None]


@triton.jit
def softplus(b_x):
    """log(1 + e^x), accurate for small e^x; x itself above 20, as in torch."""
    b_y = tl.exp(tl.minimum(b_x, 20.0))
    b_1 = 1.0 + b_y
    b_log = tl.where(b_1 == 1.0, b_y, tl.log(b_1) * (b_y / tl.where(b_1 == 1.0, 1.0, b_1 - 1.0)))
    return tl.where(b_x <= 20.0, b_log, b_x)  # NaN, which minimum may drop, stays NaN


@triton.jit
def log_decay(b_a, b_bias, b_rate, dtype: tl.constexpr, LOWER_BOUND: tl.constexpr, ROUNDED: tl.constexpr):
    """g from the projection's output, rounded to the model's dtype if ROUNDED."""
    b_g = b_a.to(tl.float32) + b_bias
    b_g = -b_rate * softplus(b_g) if LOWER_BOUND is None else LOWER_BOUND * tl.sigmoid(b_rate * b_g)
    return b_g.to(dtype).to(tl.float32) if ROUNDED else b_g


@triton.jit
def writing_strength(b_b, beta_scale):
    """beta from the projection's output; the sigmoid is rounded as in the model."""
    return beta_scale * tl.sigmoid(b_b.to(tl.float32)).to(b_b.dtype).to(tl.float32)


@triton.jit
def sigmoid_and_slope(b_x):
    """sigmoid(x) and its derivative; 1 - sigmoid(x) would lose the derivative where it is small."""
    b_s = tl.sigmoid(b_x)
    return b_s, b_s * tl.sigmoid(-b_x)


@triton.jit
def gate_and_slope(b_z, IS_SILU: tl.constexpr):
    """silu(z) or sigmoid(z), and its derivative."""
    b_gate, b_slope = sigmoid_and_slope(b_z)
    if IS_SILU:
        b_slope = b_gate + b_z * b_slope
        b_gate *= b_z
    return b_gate, b_slope


@triton.jit
def norm_and_gate(b_o, b_mean, b_w, b_z, eps, dtype: tl.constexpr, IN_FP32: tl.constexpr, IS_SILU: tl.constexpr):
    """RMS norm of b_o, whose squares have the mean b_mean, times the gate of b_z, all in fp32 blocks of one shape."""
    b_o *= tl.rsqrt(b_mean + eps)
    if IN_FP32:
        b_o *= b_w
    else:  # round before and after applying the weight
        b_o = b_o.to(dtype).to(tl.float32) * b_w
        b_o = b_o.to(dtype).to(tl.float32)
    b_gate = tl.sigmoid(b_z)
    if IS_SILU:
        b_gate *= b_z
    return b_o * b_gate


@triton.jit
def conv_silu_token(p_x, stride_t, p_conv_state, p_weight, p_bias, m_c, m_state, i_t, WIDTH: tl.constexpr):
    """silu of the convolution at token i_t, rounded as in the model. Pointers point to the channels, p_x to token 0 of
    this call; the last column of the convolution state is the token before it. m_state: channels that have one."""
    b_sum = tl.zeros(m_c.shape, tl.float32)
    for i in tl.static_range(WIDTH):
        at = i_t - (WIDTH - 1 - i)
        b_x = tl.load(p_x + at * stride_t, mask=only_if(m_c, at >= 0), other=0.0).to(tl.float32)
        if i < WIDTH - 1:
            b_x += tl.load(p_conv_state + (WIDTH + at), mask=only_if(m_state, at < 0), other=0.0).to(tl.float32)
        b_sum += b_x * tl.load(p_weight + i, mask=m_c, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_sum += tl.load(p_bias, mask=m_c, other=0.0).to(tl.float32)
    return (b_sum * tl.sigmoid(b_sum)).to(p_x.dtype.element_ty).to(tl.float32)


@triton.jit
def weights_of_tap(p_weight, b_words, i: tl.constexpr, m_c, WORDS: tl.constexpr):
    """A tap's weights in fp32: from `b_words`, which hold all four of a channel, or from memory."""
    if WORDS:
        b_weight = (b_words >> (16 * i)).to(tl.int16).to(p_weight.dtype.element_ty, bitcast=True)
    else:
        b_weight = tl.load(p_weight + i, mask=m_c, other=0.0)
    return b_weight.to(tl.float32)


@triton.jit
def conv_tile(
    p_x,
    stride_t,
    p_conv_state,
    p_weight,
    p_bias,
    i_t,
    start,
    end,
    m_c,
    m_state,
    BT: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The convolution at BT tokens from i_t on, of a sequence from start to end: ``[BT, channels]`` in fp32. Pointers
    point to the channels, p_x to token 0; the conv_state, if any, ends right before `start`. m_state: channels that
    have one. WORDS: the weights of a channel are four of 16 bits, and 8 divides their address."""
    o_i = tl.arange(0, BT)
    o_t = i_t + o_i
    m_t = o_t < end
    b_words = None
    if WORDS:
        b_words = tl.load(p_weight.to(tl.pointer_type(tl.int64), bitcast=True), mask=m_c, other=0)
    b_sum = tl.zeros([BT, m_c.shape[0]], tl.float32)
    if p_conv_state is not None and i_t == start:
        # The first tokens also read the conv_state; they are few, so row by row.
        for t in tl.static_range(WIDTH - 1):
            b_row = tl.zeros(m_c.shape, tl.float32)
            for i in tl.static_range(WIDTH - 1 - t):
                if KEEP + t + i >= WIDTH - 1:
                    b_x = tl.load(p_conv_state + (KEEP + t + i - (WIDTH - 1)), mask=m_state, other=0.0).to(tl.float32)
                    b_row += b_x * weights_of_tap(p_weight, b_words, i, m_c, WORDS)
            b_sum = tl.where((o_t - start == t)[:, None], b_row[None, :], b_sum)
    p_x += i_t * stride_t  # the tile's own offsets fit in 32 bits
    for i in tl.static_range(WIDTH):
        m = (m_t & (o_t - (WIDTH - 1 - i) >= start))[:, None] & m_c[None, :]
        o_from = (o_i - (WIDTH - 1 - i)) * stride_t
        b_x = tl.load(p_x[None, :] + o_from[:, None], mask=m, other=0.0).to(tl.float32)
        b_sum += b_x * weights_of_tap(p_weight, b_words, i, m_c, WORDS)[None, :]
    if p_bias is not None:
        b_sum += tl.load(p_bias, mask=m_c, other=0.0).to(tl.float32)[None, :]
    return b_sum


@triton.jit
def conv_silu_tile(
    p_x,
    stride_t,
    p_conv_state,
    p_weight,
    p_bias,
    i_t,
    start,
    end,
    m_c,
    m_state,
    BT: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP: tl.constexpr,
    WORDS: tl.constexpr,
):
    """silu of `conv_tile`."""
    b_sum = conv_tile(
        p_x, stride_t, p_conv_state, p_weight, p_bias, i_t, start, end, m_c, m_state, BT, WIDTH, KEEP, WORDS
    )
    return b_sum * tl.sigmoid(b_sum)
