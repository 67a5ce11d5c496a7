"""Every tolerance of the tests, with its derivation. All are relative errors in the Frobenius norm (`compare.error`).

The reference is float64 on the same, already rounded inputs, or, for layers and models, the original one in fp32. A
tolerance follows from the roundings of the computation; it is never raised to make a test pass.
"""

from __future__ import annotations

import torch

_F64, _F32, _F16, _BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# Largest relative error of one rounding.
ROUNDING = {_F64: 2**-53, _F32: 2**-24, _F16: 2**-11, _BF16: 2**-8}

# The delta rule, o and final state.
#
# fp32, token by token: a step is a decay, a difference, two sums over K that are trees of depth 8, and an update, some
# 20 roundings of 2^-25 on average, 1.3e-7 if they are independent. With unit keys and beta in [0, 2] a step does not
# enlarge the error of the state, so over T = 63 it grows like sqrt(T), to 1e-6; ten times that is allowed. A card's exp
# and rsqrt add an error of 2^-22 a step.
# fp32, in chunks: sums of 64 to 128 terms and exponents of up to 120 add about 100 units of 2^-24. Segments of a long
# sequence are merged in fp32 (tf32x3 on a card, 3.5e-7), which adds nothing that counts: keys are unit vectors and beta
# is at most 2, so that errors do not grow on the way.
# fp16 and bf16: a value passes about four roundings on its way through the chunk kernels (state, u, A or P, output),
# whose errors are independent and on average half the largest: 2 * 2^-12 = 5e-4 and 2 * 2^-9 = 4e-3. The bar leaves
# twice that in fp16 and one and a half times that in bf16. Kernels that compute in fp32 round o alone, within that bar.
# float64: at most a few hundred products with a relative error of 2^-53 each.
DELTA_RULE = {_F64: 1e-12, _F32: 1e-5, _F16: 1e-3, _BF16: 6e-3}

# Factor on these for two hard kinds of calls. Where all keys of a chunk are equal, every row of its inverse depends on
# all rows before, and their roundings point in one direction instead of being independent. With beta = 2 and no decay
# a token writes 2 (v - S k): twice the value with twice the rounding, and no error is ever forgotten. Measured in bf16:
# 6.9e-3 at most, over 1000 tokens.
HARD_CALLS = 2

# Gradients of the chunk ops. Each is a sum of products of two values that carry the error of a forward's: a state, u or
# A computed again, and a gradient on its way back, which the transposed products treat as the forward treats values.
# The gradient of g is a sum of four parts that cancel in part (of reads, scores, writes, and of the whole state), each
# with an error of its own: twice as much again. Measured 1.3e-2 in bf16.
BACKWARD = {dtype: 2 * bar for dtype, bar in DELTA_RULE.items()}

# Factor on these in fp32 where all keys of a chunk are equal and beta is 2. A chunk's system I + 2 tril(1, -1) then has
# a condition of the order of 64^2 (both it and its inverse have rows of 64 entries of size 2), so that a solve in fp32
# may lose 64^2 roundings of 2^-24: 2.4e-4, twelve times the bar. How much of that is lost depends on the order of the
# sums in the products, hence on the processor: 1e-5 to 1e-4 in the interpreter. `eager` solves in float64 and keeps the
# bar.
ILL_CONDITIONED = 12

# Everything before the delta rule, and the gated norm after it. A value is rounded once to the dtype on its way out, z
# and the norm's weight before that where the family does so; the bars leave four times that and more. In fp32 some
# thirty roundings of 2^-24 each, those of 8 taps, a sum of squares and two exponentials, make 2e-6.
PROLOGUE = {_F32: 2e-6, _F16: 1e-3, _BF16: 1.6e-2}

# Gradients of these two. Everything is computed again in fp32, and once more on the way back: twice the roundings of
# fp32. A result is rounded once to its dtype, that of the convolution's output once before that; sums over tokens are
# in fp32, whose roundings are independent, like the terms. So the bars of 16 bits are the forward's.
BACKWARD_PROLOGUE = PROLOGUE | {_F32: 2 * PROLOGUE[_F32]}

# A decode step. fp32: the recurrent rule's 1e-5, to which the convolution, the gates and the norm add a few roundings.
# fp16, bf16: q, k and v, beta, o and, before the weight, the normed o are rounded to the model's dtype, as transformers
# does; with those of y itself and of o times the weight these are six roundings, each a third of the largest on
# average, and independent. The bar is that of a single operator in bf16, and twice that in fp16.
STEP = {_F32: 1e-5, _F16: 2e-3, _BF16: 1.6e-2}

# The same fp32 products summed in another grouping: calls that are split, batched, packed or compiled.
SAME_SUMS = 1e-6

# A layer or a tiny model in fp32, outputs, logits and cached states: original and patched forward sum the same
# products in another order, 2^-24 relative each over a few hundred terms and a few layers, which stays under 1e-5;
# measured 1e-7 to 4e-7. It holds along a text and through caches: states decay and attention averages, so that rounding
# does not build up. Positions that a cache moves add the rounding of an angle, 2^-24 times at most 100 positions: 6e-6
# rad on scores of size 1, less on logits.
LAYER = 1e-5

# Log-probabilities of such a model, absolute: logits of size up to 10 that are LAYER apart.
LOG_PROBABILITY = 1e-4

# Gradients of such a model: sums over all tokens of products whose factors are LAYER apart.
GRADIENT = 1e-4

# A layer in fp16 against the same in fp32. Its own roundings (projections, activations, norm, output) are a few units
# of 2^-11 each; the recurrence is in fp32. Ten of them, all in the same direction, make 5e-3.
HALF_LAYER = 5e-3

_BY_OP = {
    **dict.fromkeys(("chunk_gdn", "chunk_kda", "recurrent_gdn", "recurrent_kda"), DELTA_RULE),
    **dict.fromkeys(("backward_gdn", "backward_kda"), BACKWARD),
    **dict.fromkeys(("prologue_gdn", "prologue_kda", "gated_norm"), PROLOGUE),
    **dict.fromkeys(("backward_prologue_gdn", "backward_prologue_kda", "backward_gated_norm"), BACKWARD_PROLOGUE),
    **dict.fromkeys(("step_gdn", "step_kda"), STEP),
}


def budget(op: str, dtype: torch.dtype, result: str) -> float:
    """Largest relative error of an op's result against the float64 oracle.

    Args:
        op: name of a registered op.
        dtype: of the call's q, k and v, or of o for a gated norm.
        result: name of the result. The convolution's state only moves numbers, which leaves no error; a recurrent
            kernel's state never leaves fp32.

    Raises:
        KeyError: the op is unknown, or no tolerance was derived for this dtype.

    Examples:
        >>> from hf_gdn.testing.tolerances import budget
        >>> budget("recurrent_gdn", torch.bfloat16, "o"), budget("recurrent_gdn", torch.bfloat16, "final_state")
        (0.006, 1e-05)
        >>> budget("prologue_kda", torch.float32, "conv_state")
        0.0
    """
    if result == "conv_state":
        return 0.0
    if result == "d_g":
        return 2 * _BY_OP[op][dtype]
    if result == "final_state" and op.startswith("recurrent_") and dtype != torch.float64:
        dtype = torch.float32
    return _BY_OP[op][dtype]
