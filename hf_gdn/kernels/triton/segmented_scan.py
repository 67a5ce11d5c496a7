"""The scan over chunks, with exact sequence parallelism on one card for few heads and long sequences.

A chunk maps the state before it to the state after it by an affine map, and so does a segment of several chunks:

    S_(s+1) = M_s S_s + C_s          M_s [K, K],  C_s [K, V]                            (docs/delta_rule.md)

C_s is the segment's final state if its initial state is zero. Column j of M_s is its final state if all values are zero
and the initial state is column j of the identity. A long sequence is split into segments of whole chunks, and three
launches replace one:

    states   all segments but the last in parallel, without outputs: V columns from zeros (in the first segment, from
             the sequence's initial state) and K columns from the identity with v = 0
    merge    S_1 = C_0 ;  S_(s+1) = M_s S_s + C_s, in fp32, overwriting C_s
    scan     all segments in parallel, each as a sequence with initial state S_s

How a sequence is split, and so the bits of its result, depends on the layer, the card and its own length, never on
other sequences in the batch or pack. Lengths are read on the device only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contract import Slots
from .chunks import CHUNK, Chunks, locate_sequence, padded, scan_config, shared_memory
from .math import dot, input_precision, only_if
from .prepared import launch
from .runtime import NOT_MEASURED, LaunchConfig, cdiv, on_device, tl, triton

# Minimum number of tokens of a sequence that is split: at least four chunks per segment. Predicted, not measured: the
# scan of two heads and 4096 tokens takes 106 us unsplit; split, 18 us for both passes and about 30 us for 14 steps of
# the merge and the launches.
MINIMUM = 4096


@dataclass(frozen=True, kw_only=True)
class SegmentsConfig:
    """The number of segments of a long sequence.

    Args:
        max_columns: maximum columns of states (HV * V) per multiprocessor for which this row is used.
        segments: number of segments.
        measured_on: as in `LaunchConfig`.
    """

    max_columns: float
    segments: int
    measured_on: str


# A program of the scan has 32 columns and takes 1.66 us per chunk if there are no more programs than multiprocessors
# (measured with a sketch on one H200; 0.87 times that without outputs). Predictions for one sequence of n chunks,
# K = V = 128, 132 multiprocessors, without the merge:
#
#     heads   segments   time in chunks             speed-up
#     2       16         n/16 (1 + 0.87 * 2 waves)  5.8
#     4       8          n/8  (1 + 0.87 * 2 waves)  2.9
#     8       4          n/4  (1 + 0.87 * 2 waves)  1.5
#     16      2          n/2  (1 + 0.87)            1.07: not split
#
# Splitting pays off if heads times long sequences is at most 8. If a batch alone fills the card, the amount of work
# determines the time: 2.6 times that of the plain scan with 16 segments, 2.4 with 8 and 2.1 with 4. The table still
# does not depend on the batch, because the bits of the result would then depend on it.
SEGMENTS_CONFIGS = (
    SegmentsConfig(max_columns=2, segments=16, measured_on=NOT_MEASURED),
    SegmentsConfig(max_columns=4, segments=8, measured_on=NOT_MEASURED),
    SegmentsConfig(max_columns=8, segments=4, measured_on=NOT_MEASURED),
)
# Number of multiprocessors assumed without a card: that of the H200.
MULTIPROCESSORS = 132


@dataclass(frozen=True, kw_only=True)
class MergeConfig(LaunchConfig):
    """Launch parameters of the merge.

    Args:
        BV: columns of V per program.
        BI: columns of M_s per product.
    """

    BV: int
    BI: int


# Narrow tiles give many programs, and compile without spills on every target.
MERGE_CONFIG = MergeConfig(BV=16, BI=32, num_warps=8, measured_on=NOT_MEASURED)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def segment_count(HV: int, V: int, device: torch.device) -> int:
    """The number of segments into which a long sequence of a layer is split on `device`."""
    multiprocessors = _multiprocessors(device) if device.type == "cuda" else MULTIPROCESSORS
    served = (c.segments for c in SEGMENTS_CONFIGS if c.max_columns * multiprocessors >= HV * V)
    return next(served, 1)


def merge_stages(BK: int, shared: int) -> int:
    """Pipeline stages of the loads of M_s in the merge, for `shared` bytes of shared memory per block."""
    return min(3, shared // (4 * BK * MERGE_CONFIG.BI))


@triton.jit
def _segment_length(tokens, minimum, BT: tl.constexpr, SEGMENTS: tl.constexpr):
    """Chunks per segment of a sequence."""
    chunks = tl.cdiv(tokens, BT)
    return tl.where(tokens >= minimum, tl.cdiv(chunks, SEGMENTS), chunks)


@triton.jit
def locate_segment(
    i_x,
    is_transition,
    p_bounds,
    p_first,
    p_long,
    sequences,
    minimum,
    T,
    BT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STATE_ONLY: tl.constexpr,
):
    """``(sequence, segment, slot, batch, first token, end, first chunk, is the last, is to be served)`` of a program.

    States are stored in slots, SEGMENTS - 1 for every sequence that may be long; slot s has the state after segment s.
    The state pass has programs per slot. The scan has programs per sequence, for its first segment, and then per slot,
    for the segment whose initial state is in the slot. `is_transition`: all columns of the program belong to M_s.
    """
    if SEGMENTS == 1:
        i_b, i_t, end, i_chunk = locate_sequence(i_x, p_bounds, p_first, T)
        yes = tl.full([], True, tl.int1)
        return i_x, i_x * 0, i_x, i_b, i_t, end, i_chunk, yes, yes
    else:
        i_slot = i_x if STATE_ONLY else i_x - sequences
        i_n = i_slot // (SEGMENTS - 1)
        if p_long is not None:
            i_n = tl.load(p_long + i_n, mask=i_slot >= 0, other=0)
        i_s = i_slot % (SEGMENTS - 1)
        if not STATE_ONLY:
            i_n = tl.where(i_slot >= 0, i_n, i_x)
            i_s = tl.where(i_slot >= 0, i_s + 1, 0)
        i_b, i_t, end, i_chunk = locate_sequence(i_n, p_bounds, p_first, T)
        length = _segment_length(end - i_t, minimum, BT, SEGMENTS)
        i_t += i_s * length * BT
        i_chunk += i_s * length
        i_next = i_t + length * BT
        is_served = (i_t < end) | (i_s == 0)
        if STATE_ONLY:  # not needed: states after the last segment, and M_s of the first (its initial state is known)
            is_served = (i_next < end) & ((i_s > 0) | (is_transition == 0))
        return i_n, i_s, i_slot, i_b, i_t, tl.minimum(end, i_next), i_chunk, i_next >= end, is_served


@triton.jit
def load_state(
    p_initial,
    p_states,
    i_n,
    i_s,
    i_slot,
    i_h,
    o_k,
    o_v,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    SEGMENTS: tl.constexpr,
    STATE_ONLY: tl.constexpr,
):
    """Initial state ``[BK, BV]`` of a segment, in fp32; columns from V on are those of the identity."""
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    b_s = tl.zeros([o_k.shape[0], o_v.shape[0]], tl.float32)
    if p_initial is not None:
        o_s = (i_n * HV + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
        m_initial = m_s if SEGMENTS == 1 else only_if(m_s, i_s == 0)
        b_s = tl.load(p_initial + o_s, mask=m_initial, other=0.0).to(tl.float32)
    if STATE_ONLY:
        b_s = tl.where(o_k[:, None] + V == o_v[None, :], 1.0, b_s)
    elif SEGMENTS > 1:
        o_s = (i_slot * HV + i_h) * K * (V + K) + o_k[:, None] * (V + K) + o_v[None, :]
        b_s = tl.load(p_states + o_s, mask=only_if(m_s, i_s > 0), other=b_s)
    return b_s


@triton.jit
def store_state(
    b_s,
    p_states,
    p_final,
    i_n,
    i_slot,
    i_h,
    o_k,
    o_v,
    is_last,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    STATE_ONLY: tl.constexpr,
):
    """Store the final state of a segment in its slot, or as the final state of the sequence."""
    if STATE_ONLY:
        o_s = (i_slot * HV + i_h) * K * (V + K) + o_k[:, None] * (V + K) + o_v[None, :]
        tl.store(p_states + o_s, b_s, mask=(o_k < K)[:, None] & (o_v < V + K)[None, :])
    else:
        o_s = (i_n * HV + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
        tl.store(p_final + o_s, b_s, mask=only_if((o_k < K)[:, None] & (o_v < V)[None, :], is_last))


@triton.jit(do_not_specialize=["minimum", "T"])
def _merge_kernel(
    p_states,  # [sequences that may be long, SEGMENTS - 1, HV, K, V + K]: C_s and M_s; S_(s+1) overwrites C_s
    p_bounds,  # [N + 1], or None
    p_first,  # [N], or None
    p_long,  # [sequences that may be long], or None
    minimum,
    T,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BI: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_program = tl.program_id(0)
    i_v = i_program % tl.cdiv(V, BV)
    i_nh = (i_program // tl.cdiv(V, BV)).to(tl.int64)
    i_n, i_h = i_nh // HV, i_nh % HV
    p_states += (i_n * (SEGMENTS - 1) * HV + i_h) * K * (V + K)
    if p_long is not None:
        i_n = tl.load(p_long + i_n)
    _, i_t, end, _ = locate_sequence(i_n, p_bounds, p_first, T)
    length = _segment_length(end - i_t, minimum, BT, SEGMENTS)
    slots = tl.cdiv(end - i_t, tl.maximum(length, 1) * BT) - 1
    if slots < 2:
        return
    o_k = tl.arange(0, BK)
    o_i = tl.arange(0, BI)
    o_v = i_v * BV + tl.arange(0, BV)
    # Products are transposed: as the left operand, the narrow state stays in registers on every card.
    o_s = o_k[None, :] * (V + K) + o_v[:, None]
    m_s = (o_k < K)[None, :] & (o_v < V)[:, None]
    b_new = tl.load(p_states + o_s, mask=m_s, other=0.0)
    b_s = b_new
    # One loop over the tiles of all segments, so that tiles of the next segment are prefetched.
    for i_tile in range((slots - 1) * (BK // BI)):
        i_slot, i_r = i_tile // (BK // BI) + 1, i_tile % (BK // BI)
        o_j = i_r * BI + o_i
        p_slot = p_states + i_slot * HV * K * (V + K)
        b_c = tl.load(p_slot + o_s, mask=only_if(m_s, i_r == 0), other=0.0)
        m_m = (o_j < K)[:, None] & (o_k < K)[None, :]
        b_m = tl.load(p_slot + o_k[None, :] * (V + K) + V + o_j[:, None], mask=m_m, other=0.0)
        b_s = tl.where(i_r == 0, b_new, b_s)
        b_new = tl.where(i_r == 0, b_c, b_new)
        # Rows of S that the tile's columns of M multiply.
        m_r = tl.arange(0, BK // BI)[None, :, None] == i_r
        b_part = tl.sum(tl.where(m_r, tl.reshape(b_s, [BV, BK // BI, BI]), 0.0), 1)
        b_new = dot(b_part, b_m, b_new, PRECISION=PRECISION)
        tl.store(p_slot + o_s, b_new, mask=only_if(m_s, i_r == BK // BI - 1))


def scan(
    kernel: Any,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    v: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor,
    chunks: Chunks,
    key_tiles: int,
    slots: Slots | None = None,
) -> None:
    """Scan prepared chunks; long sequences are split into segments.

    Args:
        kernel: ``_scan_kernel`` of an op; if `p_o` is None, it computes states only.
        inputs: kernel arguments that the state depends on.
        outputs: kernel arguments that only o depends on, and `p_o`, to which it is written.
        v: ``[B, T, HV, V]``.
        initial_state: ``[N, HV, K, V]``, or None.
        final_state: ``[N, HV, K, V]``, the output for final states.
        chunks: the call's chunks.
        key_tiles: ``[64, BK]`` tiles that the scan reads per chunk.
        slots: both states are one pool, read and written in place. Its sequences are not split: the last segment would
            write a state that the first one may not have read yet.
    """
    (T, HV, V), K = v.shape[1:], final_state.shape[2]
    N = len(final_state) if slots is None else len(slots.rows)
    BK, precision = padded(K), input_precision(v.dtype)
    segments = segment_count(HV, V, v.device) if T >= MINIMUM and slots is None else 1
    long, states, between = None, None, 0
    if segments > 1:
        # T bounds the number of packed sequences that can be long, and so memory and programs.
        candidates = N if chunks.bounds is None else min(N, T // MINIMUM)
        if chunks.bounds is not None:
            long = chunks.bounds.diff().topk(candidates, sorted=False).indices
        between = candidates * (segments - 1)
        states = torch.empty(between, HV, K, V + K, dtype=torch.float32, device=v.device)
    tables = dict(p_bounds=chunks.bounds, p_first=chunks.first, p_long=long)
    shape = dict(T=T, HV=HV, K=K, V=V, BT=CHUNK, BK=BK)

    # Bits must not depend on the batch, and these states grow with it: with segments, always use the narrowest tile.
    heads = N * HV if segments == 1 else 1
    BV, warps, stages = scan_config(heads, V, BK, v.element_size(), shared_memory(v.device), key_tiles)
    common = dict(
        inputs,
        p_initial=initial_state if initial_state is None or slots is not None else initial_state.contiguous(),
        p_slots=None if slots is None else slots.rows,
        p_begun=None if slots is None else slots.begun,
        stride_pool=None if slots is None else final_state.stride(0),
        p_states=states,
        sequences=N,
        minimum=MINIMUM,
        BV=BV,
        SEGMENTS=segments,
        PRECISION=precision,
        num_warps=warps,
        num_stages=stages,
        **tables,
        **shape,
    )
    with on_device(v):
        if segments > 1:
            launch(kernel, (cdiv(V + K, BV) * between * HV,), p_final=None, **dict.fromkeys(outputs), **common)
            launch(
                _merge_kernel,
                (cdiv(V, MERGE_CONFIG.BV) * candidates * HV,),
                p_states=states,
                minimum=MINIMUM,
                BV=MERGE_CONFIG.BV,
                BI=min(BK, MERGE_CONFIG.BI),
                SEGMENTS=segments,
                PRECISION="ieee" if precision == "ieee" or torch.version.hip else "tf32x3",
                num_warps=MERGE_CONFIG.num_warps,
                num_stages=merge_stages(BK, shared_memory(v.device)),
                **tables,
                **shape,
            )
        launch(kernel, (cdiv(V, BV) * (N + between) * HV,), p_final=final_state, **outputs, **common)
