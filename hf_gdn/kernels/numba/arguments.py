"""What a compiled function is called with: one block of integers and floats, with tensors as addresses and strides.

A compiled function gets the address of this block and nothing else, so a call costs no type dispatch, and any thread
can run it. Both sides name the numbers by the same `Layout`.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

LANES = 32  # numbers that compiled functions treat at once
# Codes of dtypes.
FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = range(4)
CODES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}
# At the start of every block: number of tasks, the next task, the next thread, and the scratch memory of the threads,
# of which each has `scratch_bytes`.
COMMON = ("tasks", "next_task", "next_thread", "scratch", "scratch_bytes")


class Layout:
    """Names of the numbers of a block.

    Args:
        tensors: letters of the strided dimensions by the tensor's name. A tensor x with "bt" takes the integers x
            (address), x_dtype, x_b and x_t (strides in bytes).
        integers, floats: further names.
    """

    def __init__(self, tensors: dict[str, str], integers: Iterable[str], floats: Iterable[str] = ()) -> None:
        names = [*COMMON]
        for name, letters in tensors.items():
            names += [name, f"{name}_dtype", *(f"{name}_{letter}" for letter in letters)]
        self.integers, self.floats = [*names, *integers], [*floats]
        self._letters = [len(letters) for letters in tensors.values()]
        packing = struct.Struct(f"={len(self.integers)}q{len(self.floats)}d")
        self._pack_into, self._memory = packing.pack_into, ctypes.c_char * packing.size

    def block(self, tasks: int, scratch: int, scratch_bytes: int, tensors: Sequence[Tensor | None], *numbers: float):
        """The block of a call, as a ctypes array.

        Args:
            tasks, scratch, scratch_bytes: see `COMMON`.
            tensors: in the layout's order; the address of None is 0.
            numbers: all other numbers, integers first, in the layout's order.
        """
        row = [tasks, 0, 0, scratch, scratch_bytes]
        for x, dims in zip(tensors, self._letters):
            if x is None:
                row += [0] * (2 + dims)
            else:
                size, address = x.element_size(), x.data_ptr()
                if address == 0 and x.numel() > 0:
                    raise RuntimeError(
                        f"backend 'numba' needs tensors with memory of their own; got a {type(x).__name__} "
                        f"on {x.device}"
                    )
                row += (address, CODES.get(x.dtype, -1))
                row += [size * stride for stride in x.stride()[:dims]]
        block = self._memory()
        self._pack_into(block, 0, *row, *numbers)
        return block


def padded(n: int) -> int:
    """n rounded up to whole vectors."""
    return -(-n // LANES) * LANES


BLOCK = 16  # tokens that a task of the recurrent and the step kernel prepares at once
PROLOGUE_BLOCK = 64  # tokens of a task of the prologue
NORM_BLOCK = 64  # rows of a task of the gated norm

# Projections: strides over sequences, tokens, key heads, and value heads of a key head.
_PROJECTIONS = {"q": "bth", "k": "bth", "v": "bthr", "a": "bthr", "b": "bthr"}
_WEIGHTS = {"conv": "", "conv_bias": "", "A_log": "", "dt_bias": ""}
# States: the stride over sequences, or over slots of a pool; which slot a sequence has, and whether it has begun.
_STATES = {"conv_state": "b", "state": "b"}
_SLOTS = {"slots": "", "begun": ""}
_SIZES = ("B", "T", "HK", "R", "K", "V", "width", "keep", "is_kda", "decay_dtype", "has_lower_bound")

STEP = Layout(
    {**_PROJECTIONS, "z": "bthr", **_WEIGHTS, "norm": "", **_STATES, "y": "", **_SLOTS},
    (*_SIZES, "norm_in_fp32", "gate_is_silu"),
    ("lower_bound", "beta_scale", "eps", "scale"),
)
PROLOGUE = Layout(
    {
        **_PROJECTIONS,
        **_WEIGHTS,
        "conv_state": "b",
        "bounds": "",
        "lengths": "",
        **dict.fromkeys(("out_q", "out_k", "out_v", "out_g", "out_beta", "recent"), ""),
        **_SLOTS,
    },
    (*_SIZES, "blocks"),
    ("lower_bound", "beta_scale"),
)
RECURRENT = Layout(
    {
        **dict.fromkeys(("q", "k", "v", "g", "beta"), "bth"),
        **dict.fromkeys(("initial", "final"), "b"),
        **dict.fromkeys(("bounds", "o"), ""),
        "states": "bth",
        **_SLOTS,
    },
    ("N", "T", "HK", "HV", "K", "V", "is_kda", "qk_l2norm"),
    ("scale",),
)
GATED_NORM = Layout(
    {"o": "", "z": "bthr", "weight": "", "y": ""},
    ("rows", "T", "HV", "R", "V", "norm_in_fp32", "gate_is_silu"),
    ("eps",),
)
