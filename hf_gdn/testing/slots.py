"""What holds for kernels whose states are in slots of a pool."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels import slots as copies
from ..kernels.contract import Slots
from ..registry import Kernel
from . import calls, tolerances
from .calls import SIGNATURES, Call, Results
from .compare import assert_close, assert_same


def in_slots(kernel: Kernel, call: Call, apart: float = 0.0) -> None:
    """Sequences whose states are in a pool are what the oracle makes of each alone, and so are their slots afterwards.

    Every third sequence has not begun: its slot holds NaN and it starts from zeros. All other slots, and those of
    sequences without tokens, keep their bits. Kernels that take no slots are called with copies of the states.
    """
    signature, bounds = SIGNATURES[kernel.op], call.get("cu_seqlens")
    rows = len(calls.tensors(call[signature.per_token[0]])[0])
    sequences = rows if bounds is None else len(bounds) - 1
    device = calls.tensors(call)[0].device
    random = torch.Generator().manual_seed(7)
    index = torch.randperm(sequences + 3, generator=random)[:sequences]
    begun = torch.arange(sequences) % 3 != 2
    pools, wide = {}, {}
    for name in signature.carried:
        given = call[name]
        states = 0.1 * torch.randn(sequences, *given.shape[1:], generator=random, dtype=torch.float64)
        # Rows of a pool are apart in memory, as layers share it.
        wide[name] = torch.full((sequences + 3, 2, *given.shape[1:]), torch.nan, dtype=given.dtype)
        wide[name][index[begun], 1] = states[begun].to(given.dtype)
        wide[name] = wide[name].to(device)
        pools[name] = wide[name][:, 1]
    before = {name: x.clone() for name, x in wide.items()}
    slots = Slots(index.to(device), begun.to(device))
    got = _run(kernel, {**call, **pools}, slots)
    moved = [bounds is None or bool(bounds[n] < bounds[n + 1]) for n in range(sequences)]
    for name, result in signature.carried.items():
        assert not got or result not in got or got[result] is pools[name], f"{kernel.op}: returned another tensor"
        kept = torch.ones(sequences + 3, dtype=torch.bool)
        kept[index[torch.tensor(moved)]] = False
        _assert_kept(
            f"slots of {name} that no sequence has", wide[name][kept.to(device)], before[name][kept.to(device)]
        )
        _assert_kept(f"what is beside the slots of {name}", wide[name][:, 0], before[name][:, 0])
    for n in range(sequences):
        if not moved[n]:
            continue
        begins = {
            name: before[name][index[n], 1][None] if begun[n] else torch.zeros_like(pools[name][:1]) for name in pools
        }
        wanted, part = _alone(kernel.op, {**call, **begins}, n)
        for name, x in wanted.items():
            carried = next((argument for argument, result in signature.carried.items() if result == name), None)
            own = got[name][:, part] if bounds is not None else got.get(name, x)[n : n + 1]
            own = own if carried is None else pools[carried][index[n]][None]
            budget = tolerances.budget(kernel.op, calls.dtype_of(kernel.op, call), name)
            assert_close(f"{kernel.op}: {name} of sequence {n}", own, x, budget)


def in_slots_of_a_pool(op: str, call: Call) -> Call:
    """The call with its states in slots of pools that are twice as large, in any order."""
    pools = {}
    for name in SIGNATURES[op].carried:
        given, bounds = call[name], call.get("cu_seqlens")
        sequences = len(given) if bounds is None else len(bounds) - 1
        pools[name] = given.new_empty(2 * sequences, 2, *given.shape[1:])[:, 1]
    device = next(iter(pools.values())).device
    rows = torch.arange(sequences, device=device) * 2
    return {**call, **pools, "slots": Slots(rows, rows > 0)}


def _assert_kept(name: str, x: Tensor, before: Tensor) -> None:
    """The same bits, NaN included."""
    assert_same(name, x.nan_to_num(nan=-1.0), before.nan_to_num(nan=-1.0))


def _run(kernel: Kernel, call: Call, slots: Slots) -> Results:
    signature = SIGNATURES[kernel.op]
    if signature.in_place:
        return {"y": copies.step(kernel, slots=slots, **call)}
    if kernel.op.startswith("prologue"):
        made = kernel.fn(**call, slots=slots)
    else:
        inputs = [call[name] for name in signature.per_token]
        options = {name: x for name, x in call.items() if name not in signature.per_token}
        made = copies.delta_rule(kernel, *inputs, slots=slots, **options)
    return {name: x for name, x in zip(signature.results, made, strict=True) if x is not None}


def _alone(op: str, call: Call, n: int) -> tuple[Results, slice]:
    """The oracle's results for sequence n alone, from the states in the call, and the sequence's tokens."""
    bounds: Tensor | None = call.get("cu_seqlens")
    if bounds is None:
        alone: dict[str, Any] = calls.rows(
            op, {k: x for k, x in call.items() if k not in SIGNATURES[op].carried}, slice(n, n + 1)
        )
        return calls.reference(op, {**call, **alone}), slice(None)
    first, last = list(pairwise(bounds.tolist()))[n]
    part = slice(first, last)
    return calls.reference(op, calls.tokens(op, {**call, "cu_seqlens": None}, part)), part
