"""The compiled part of `hf_gdn.kernels.numba.gated_norm`: a task is some rows."""

from __future__ import annotations

from ..arguments import NORM_BLOCK
from .entry import arguments, next_task, scratch_of_thread
from .lanes import LANES, at
from .math import norm_and_gate
from .memory import read_row, size_of, write_row


def gated_norm(block):
    x, scratch, task = arguments(block), scratch_of_thread(block), next_task(block)
    V, HV = x.V, x.HV
    VP, size = (V + LANES - 1) // LANES * LANES, size_of(x.o_dtype)
    weight, o, z, room = scratch, at(scratch, VP), at(scratch, 2 * VP), at(scratch, 3 * VP)
    read_row(x.weight, x.weight_dtype, V, weight)
    while task < x.tasks:
        for i in range(task * NORM_BLOCK, min(task * NORM_BLOCK + NORM_BLOCK, x.rows)):
            h, t = i % HV, i // HV
            gate = x.z + t // x.T * x.z_b + t % x.T * x.z_t + h // x.R * x.z_h + h % x.R * x.z_r
            read_row(x.o + i * V * size, x.o_dtype, V, o)
            read_row(gate, x.z_dtype, V, z)
            norm_and_gate(o, z, weight, V, x.eps, x.y_dtype, x.norm_in_fp32, x.gate_is_silu)
            write_row(o, x.y + i * V * size, x.y_dtype, V, room)
        task = next_task(block)
