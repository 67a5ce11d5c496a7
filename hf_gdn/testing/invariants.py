"""What holds for every kernel, one function each: ``function(kernel, call, apart, ...)`` raises where it does not.

`apart` is how far results may be from each other where the same tokens are computed in other company (split, batched,
packed, with other strides): 0 asks for the same bits. `hf_gdn.testing.kernel_cases` has the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import torch

from ..registry import Kernel
from . import calls, tolerances
from .calls import SIGNATURES, Call, Results, run
from .compare import assert_close, assert_same


def matches_reference(
    kernel: Kernel, call: Call, apart: float = 0.0, *, factor: float = 1.0, negligible: float = 0.0
) -> Results:
    """Results are the float64 oracle's within `factor` times `tolerances.budget`, in the dtypes of the contract.

    A result smaller than `negligible` times the largest one need only be as small.
    """
    wanted = calls.reference(kernel.op, call)  # first: a kernel that writes to its inputs must not change it
    got = run(kernel, call)
    assert got.keys() == wanted.keys(), f"{kernel.op} returned {sorted(got)}, expected {sorted(wanted)}"
    least = negligible * max(x.norm().item() for x in wanted.values())
    for name, x in got.items():
        expected = calls.result_dtype(kernel.op, call, name)
        assert x.dtype == expected, f"{name} is {x.dtype}, expected {expected}"
        budget = factor * tolerances.budget(kernel.op, calls.dtype_of(kernel.op, call), name)
        if wanted[name].norm() >= least:
            assert_close(f"{kernel.op}: {name}", x, wanted[name], budget)
        else:
            assert x.norm() < least, f"{kernel.op}: {name} has norm {x.norm():.1e}, expected less than {least:.1e}"
    return got


def same_bits(kernel: Kernel, call: Call, apart: float = 0.0, runs: int = 2) -> None:
    """Every run gives the same bits."""
    first = run(kernel, call)
    for _ in range(runs - 1):
        _compare(kernel, call, run(kernel, call), first, 0.0)


def inputs_untouched(kernel: Kernel, call: Call, apart: float = 0.0) -> None:
    """No argument is changed but the states that an op updates in place."""
    given = calls.tensors(call)
    before = [x.clone() for x in given]
    run(kernel, call)
    for x, y in zip(given, before):
        assert_same("an argument", x, y)


def batched_equals_single(kernel: Kernel, call: Call, apart: float = 0.0, parts: Sequence[slice] | None = None) -> None:
    """Rows of a batch are what they are without the others; `parts` are the rows to look at, each alone by default."""
    whole = _of_tokens(kernel, run(kernel, call))
    for part in parts or [slice(row, row + 1) for row in range(len(next(iter(whole.values()))))]:
        few = run(kernel, calls.rows(kernel.op, call, part))
        _compare(kernel, call, few, {name: x[part] for name, x in whole.items()}, apart, f", rows {part}")


def split_equals_whole(kernel: Kernel, call: Call, apart: float = 0.0, *, sizes: Sequence[int]) -> None:
    """Tokens read in pieces of `sizes`, each from where the one before ended, are what they are at once.

    Chunks are counted from the first token of a call, so chunk kernels get the oracle's budget rather than 0.
    """
    op, signature = kernel.op, SIGNATURES[kernel.op]
    whole, pieces, rest = _of_tokens(kernel, run(kernel, call)), [], call
    for first, last in pairwise(accumulate(sizes, initial=0)):
        pieces.append(run(kernel, calls.tokens(op, rest, slice(first, last))))
        rest = rest | {argument: pieces[-1][result] for argument, result in signature.carried.items()}
    carried = signature.carried.values()
    got = {n: pieces[-1][n] if n in carried else torch.cat([piece[n] for piece in pieces], 1) for n in whole}
    if op.startswith("chunk_") and not apart:
        apart = tolerances.budget(op, calls.dtype_of(op, call), "o")
    _compare(kernel, call, got, whole, apart, f", pieces of {list(sizes)}")


def packed_equals_separate(kernel: Kernel, call: Call, apart: float = 0.0, only: Sequence[int] | None = None) -> None:
    """Sequences packed by `cu_seqlens` are what they are alone; `only` are those to look at, all by default."""
    op, carried = kernel.op, SIGNATURES[kernel.op].carried
    packed = _of_tokens(kernel, run(kernel, call))
    for n, (first, last) in enumerate(pairwise(call["cu_seqlens"].tolist())):
        if (only is not None and n not in only) or ("projected" in call and first == last):
            continue
        alone = calls.tokens(op, {**call, "cu_seqlens": None}, slice(first, last))
        if "keep" in call:  # packed sequences do not see a conv_state
            alone |= dict(conv_state=None, keep=0)
        elif carried:
            alone |= {name: None if call[name] is None else call[name][n : n + 1] for name in carried}
        wanted = _of_tokens(kernel, run(kernel, alone))
        got = {x: packed[x][n : n + 1] if x in carried.values() else packed[x][:, first:last] for x in wanted}
        _compare(kernel, call, got, wanted, apart, f", sequence {n}")


def strided_inputs(
    kernel: Kernel, call: Call, apart: float = 0.0, *, layout: Callable[[str, Call], Call] = calls.in_larger_tensors
) -> None:
    """Results do not depend on strides; `layout` is one of the functions of `hf_gdn.testing.calls`."""
    views = layout(kernel.op, call)
    changed = [x.stride() != y.stride() for x, y in zip(calls.tensors(views), calls.tensors(call), strict=True)]
    assert any(changed), "the layout changes no strides"
    matches_reference(kernel, views)
    _compare(kernel, call, run(kernel, views), run(kernel, call), apart)


def no_tokens(kernel: Kernel, call: Call, apart: float = 0.0) -> None:
    """A call without tokens returns an empty output and the state as it was, in a tensor of its own unless in place."""
    got, state = run(kernel, call), call["initial_state"]
    assert got["o"].shape == call["v"].shape and got["o"].shape[1] == 0
    assert_same("final_state", got["final_state"], torch.zeros_like(got["final_state"]) if state is None else state)
    assert got["final_state"] is not state, "the final state is the initial state's own tensor"


def inplace_equals_new(kernel: Kernel, call: Call, apart: float = 0.0) -> None:
    """``inplace=True`` writes the same state to the tensor that was given, and nothing to another argument."""
    inputs_untouched(kernel, call)
    _compare(kernel, call, run(kernel, {**call, "inplace": True}), run(kernel, call), 0.0)
    state = call["initial_state"].clone()
    inputs_untouched(kernel, {**call, "initial_state": state, "inplace": True})
    kernel.fn(**{**call, "initial_state": state, "inplace": True})
    assert not torch.equal(state, call["initial_state"]), "inplace=True left the state as it was"


def token_states(kernel: Kernel, call: Call, apart: float = 0.0) -> None:
    """`token_states` receives the state after every token, in a view of a larger tensor, and changes no result."""
    B, T = call["q"].shape[:2]
    whole = run(kernel, call)
    shape = whole["final_state"].shape[1:]
    room = torch.full((B, T + 2, *shape), torch.nan, device=call["q"].device)  # as in a cache with room for more tokens
    _compare(kernel, call, run(kernel, {**call, "token_states": room[:, 1:-1]}), whole, 0.0)
    for t in range(T):
        part = calls.tokens(kernel.op, call, slice(t + 1))
        name, exact = f"state after token {t}", calls.reference(kernel.op, part)["final_state"]
        assert_close(name, room[:, 1 + t], exact, tolerances.budget(kernel.op, call["q"].dtype, "final_state"))
        _compare(kernel, call, {name: room[:, 1 + t]}, {name: run(kernel, part)["final_state"]}, apart)
    assert room[:, 0].isnan().all() and room[:, -1].isnan().all(), "wrote beside token_states"


def host_never_asked(kernel: Kernel, call: Call, apart: float = 0.0) -> None:
    """No value of a tensor is read on the host, which would wait for the device. For kernels of a device."""

    def refuse(*args: Any) -> None:
        raise AssertionError("reads a tensor's values on the host")

    with ExitStack() as stack:
        for name in ("tolist", "item", "__int__", "__index__", "__bool__"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuse))
        kernel.fn(**call)


def _of_tokens(kernel: Kernel, results: Results) -> Results:
    """The results that are not sums over all tokens of a call."""
    return {name: x for name, x in results.items() if name not in SIGNATURES[kernel.op].summed}


def _compare(kernel: Kernel, call: Call, got: Results, wanted: Results, apart: float, where: str = "") -> None:
    for name, x in wanted.items():
        title, dtype = f"{kernel.op}: {name}{where}", calls.dtype_of(kernel.op, call)
        if not apart:
            assert_same(title, got[name], x)
        else:  # half types round what is `apart`, and may round it to either side
            half = tolerances.ROUNDING[dtype] > tolerances.ROUNDING[torch.float32]
            assert_close(title, got[name], x, tolerances.budget(kernel.op, dtype, name) if half else apart)
